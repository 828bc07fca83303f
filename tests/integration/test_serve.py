"""The server as a person starts it: serve.py, and TorchServe's own command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from lib.packaging.builder import ArchiveReport
from lib.server.java import find_java_home
from lib.server.process import ADDRESS_KEYS, GRPC_PORT_KEYS, WORKER_PORT_KEY, free_ports, is_listening


def own_config(project_dir: Path, folder: Path) -> tuple[Path, list[str]]:
    """The project's config.properties with other ports, and the three addresses."""
    ports = free_ports(6)
    addresses = [f"http://127.0.0.1:{port}" for port in ports[:3]]
    text = (project_dir / "config.properties").read_text()
    for key, address in zip(ADDRESS_KEYS, addresses, strict=True):
        text = re.sub(rf"(?m)^{key}=.*$", f"{key}={address}", text)
    for key, port in zip([*GRPC_PORT_KEYS, WORKER_PORT_KEY], ports[3:], strict=True):
        text += f"\n{key}={port}\n"
    path = folder / "config.properties"
    path.write_text(text)
    return path, addresses


def test_serve_says_when_it_is_ready_and_a_signal_ends_all_of_it(
    archive: ArchiveReport, project_dir: Path, tmp_path: Path, smear: bytes
) -> None:
    config, addresses = own_config(project_dir, tmp_path)
    ready_file = tmp_path / "ready"
    command = [sys.executable, "scripts/serve.py", "--ts-config", str(config)]
    command += ["--model-store", str(archive.path.parent), "--ready-file", str(ready_file)]
    serve = subprocess.Popen(
        command, cwd=project_dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 240
        while not (ready_file.exists() and ready_file.read_text()):
            assert serve.poll() is None, serve.stdout.read() if serve.stdout else ""
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert ready_file.read_text().strip() == addresses[0]
        answer = requests.post(f"{addresses[0]}/predictions/damoyolo", data=smear, timeout=120)
        assert len(answer.json()["detections"]) == 21
    finally:
        serve.send_signal(signal.SIGTERM)
        printed, _ = serve.communicate(timeout=60)
    assert serve.returncode == 0
    assert f"curl --max-time 60 -X POST {addresses[0]}/predictions/damoyolo" in printed
    assert not any(is_listening(int(address.rsplit(":", 1)[1])) for address in addresses)


def test_serve_fails_at_once_without_an_archive(project_dir: Path, tmp_path: Path) -> None:
    config, _ = own_config(project_dir, tmp_path)
    command = [sys.executable, "scripts/serve.py", "--ts-config", str(config), "--model-store", str(tmp_path)]
    serve = subprocess.run(command, cwd=project_dir, capture_output=True, text=True, timeout=60)
    assert serve.returncode == 1
    assert "scripts/build_archive.py" in serve.stderr


def test_torchserve_s_own_command_works_from_the_project_root(
    archive: ArchiveReport, project_dir: Path, tmp_path: Path, smear: bytes
) -> None:
    config, addresses = own_config(project_dir, tmp_path)
    environment = {
        **os.environ,
        "JAVA_HOME": str(find_java_home()),
        "TMPDIR": str(tmp_path),
        "TEMP": str(tmp_path),
        "LOG_LOCATION": str(tmp_path / "logs"),
    }
    torchserve = [sys.executable, "-m", "ts.model_server"]
    options = ["--ncs", "--model-store", str(archive.path.parent), "--ts-config", str(config)]
    started = {"cwd": project_dir, "env": environment, "timeout": 60, "check": True}
    subprocess.run([*torchserve, "--start", *options], stdout=subprocess.DEVNULL, **started)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert time.monotonic() < deadline
            try:
                model = requests.get(f"{addresses[1]}/models/damoyolo", timeout=60).json()[0]
                if [worker["status"] for worker in model["workers"]] == ["READY"]:
                    break
            except (requests.RequestException, KeyError):
                pass
            time.sleep(0.5)
        answer = requests.post(f"{addresses[0]}/predictions/damoyolo", data=smear, timeout=120)
        assert len(answer.json()["detections"]) == 21
        assert "stage_seconds_total" in requests.get(f"{addresses[2]}/metrics", timeout=60).text
    finally:
        subprocess.run([*torchserve, "--stop", "--foreground"], stdout=subprocess.DEVNULL, **started)
    assert not is_listening(int(addresses[0].rsplit(":", 1)[1]))


@pytest.mark.parametrize("version_text", ['openjdk version "17.0.15"', 'java version "1.8.0_401"'])
def test_the_version_of_a_java_program_is_understood(tmp_path: Path, version_text: str) -> None:
    from lib.server.java import java_version

    program = tmp_path / "java"
    program.write_text(f"#!/bin/sh\necho '{version_text}' >&2\n")
    program.chmod(0o755)
    assert java_version(program) == (17 if "17" in version_text else 8)
    assert java_version(tmp_path / "nothing") == 0
