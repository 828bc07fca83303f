"""Other starts of the server than that of conftest.py: with a proxy, stock, by TorchServe's command."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests

from lib.server.java import find_java_home
from lib.server.process import ADDRESS_KEYS, GRPC_PORT_KEYS, free_ports

from doubles.echo_handler import write_echo_archive
from doubles.real_server import config_with_free_ports, ports_in_use, wait_until


def test_serve_fails_at_once_without_an_archive(project_dir, tmp_path):
    config, _ = config_with_free_ports(project_dir, tmp_path)
    command = [sys.executable, "scripts/serve.py", "--ts-config", str(config), "--model-store", str(tmp_path)]
    serve = subprocess.run(command, cwd=project_dir, capture_output=True, text=True, timeout=60)
    assert serve.returncode == 1
    assert "scripts/build_archive.py" in serve.stderr


def is_ready(management_url):
    """Whether the only worker has loaded the model."""
    try:
        model = requests.get(f"{management_url}/models/damoyolo", timeout=60).json()[0]
    except (requests.RequestException, KeyError):
        return False
    return [worker["status"] for worker in model["workers"]] == ["READY"]


def documented_curl(project_dir, address):
    """The first request of docs/operations.md after `torchserve --start`, to another address."""
    lines = (project_dir / "docs/operations.md").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("torchserve --start"))
    command = next(line for line in lines[start:] if line.startswith("curl "))
    return shlex.split(command.replace("http://127.0.0.1:8080", address))


def private_environment(folder):
    """Variables with which a server keeps its files in this folder."""
    return {
        **os.environ,
        "JAVA_HOME": str(find_java_home()),
        "TMPDIR": str(folder),
        "TEMP": str(folder),
        "LOG_LOCATION": str(folder / "logs"),
        "METRICS_LOCATION": str(folder / "logs"),
    }


@pytest.mark.slow
def test_torchserve_s_own_command_works_from_the_project_root(archive, project_dir, tmp_path, smear):
    config, addresses = config_with_free_ports(project_dir, tmp_path)
    torchserve = [sys.executable, "-m", "ts.model_server"]
    options = ["--ncs", "--model-store", str(archive.path.parent), "--ts-config", str(config)]
    started = {"cwd": project_dir, "env": private_environment(tmp_path), "timeout": 60, "check": True}

    subprocess.run([*torchserve, "--start", *options], stdout=subprocess.DEVNULL, **started)
    try:
        # At once, as pasted from the page.
        curl = documented_curl(project_dir, addresses[0])
        answer = subprocess.run(curl, cwd=project_dir, capture_output=True, text=True, timeout=240)
        assert len(json.loads(answer.stdout)["detections"]) == 21, answer.stderr
        assert (
            "damoyolo_stage_duration_seconds_sum" in requests.get(f"{addresses[2]}/metrics", timeout=60).text
        )
        # The front end of deploy/ is in place.
        answer = requests.post(
            f"{addresses[0]}/predictions/damoyolo",
            data=smear,
            headers={"Content-Type": "application/x-www-form-urlencoded"},
            timeout=120,
        )
        assert len(answer.json()["detections"]) == 21
    finally:
        subprocess.run([*torchserve, "--stop", "--foreground"], stdout=subprocess.DEVNULL, **started)
    assert not ports_in_use(addresses[:1])


def test_an_archive_serves_on_a_stock_server_with_no_file_of_this_project_beside_it(archive, tmp_path, smear):
    store, folder = tmp_path / "store", tmp_path / "elsewhere"
    for each in (store, folder):
        each.mkdir()
    (store / "damoyolo.mar").symlink_to(archive.path)
    ports = free_ports(5)
    addresses = [f"http://127.0.0.1:{port}" for port in ports[:3]]
    settings = dict(zip(ADDRESS_KEYS, addresses, strict=True))
    settings |= dict(zip(GRPC_PORT_KEYS, map(str, ports[3:]), strict=True))
    # Only so that several servers can run on this machine.
    config = folder / "ports.properties"
    config.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs"]
    command += ["--disable-token-auth", "--ts-config", str(config)]
    command += ["--model-store", str(store), "--models", "damoyolo=damoyolo.mar"]
    environment = private_environment(folder)
    environment.pop("PYTHONPATH", None)
    with (folder / "output.txt").open("w") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until(lambda: is_ready(addresses[1]), "the server being ready")
        for _ in range(3):
            answer = requests.post(f"{addresses[0]}/predictions/damoyolo", data=smear, timeout=120)
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["detections"]) == 21
            time.sleep(1.1)  # counters are sent once a second, and must not fail a request
        refused = requests.post(f"{addresses[0]}/predictions/damoyolo", data=b"no image", timeout=120)
        assert refused.status_code == 415
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    wait_until(lambda: not ports_in_use(addresses), "the end of the server", 60.0)


def test_a_proxy_in_the_environment_does_not_keep_serve_from_reporting_ready(project_dir, tmp_path):
    write_echo_archive(tmp_path / "damoyolo.mar", "damoyolo")
    config, addresses = config_with_free_ports(project_dir, tmp_path)
    ready_file = tmp_path / "ready"
    command = [sys.executable, "scripts/serve.py", "--ts-config", str(config), "--model-store", str(tmp_path)]
    with socket.socket() as listener:  # accepts connections and never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
        names = ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
        environment = {**os.environ, **dict.fromkeys(names, proxy), "no_proxy": ""}
        serve = subprocess.Popen(
            [*command, "--ready-file", str(ready_file)],
            cwd=project_dir,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: ready_file.exists() and bool(ready_file.read_text()), "readiness", 120.0)
        finally:
            serve.send_signal(signal.SIGTERM)
            serve.wait(60)
    assert not ports_in_use(addresses)
