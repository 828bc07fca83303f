"""scripts/deploy.py against a real server under load: no request fails and no answer changes."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch

from lib.archive.members import MANIFEST_FILE, copy_archive, opened_archive, read_manifest, read_settings
from lib.archive.reader import load_detector
from lib.packaging.builder import ArchiveRequest, build_archive
from lib.server.process import TorchServeProcess, describe_model

import deploy
from doubles.answers import assert_same_detections
from doubles.real_server import wait_until

TIMEOUT_S = 60.0
CLIENTS = 3
# Between two requests of a client, so that the cores are busy but workers can still start.
PAUSE_S = 0.1


@pytest.fixture(scope="module")
def first_archive(tmp_path_factory):
    """The demo weights with small images, quick on a CPU, in float32: answers do not depend on the batch."""
    return build_archive(
        ArchiveRequest(
            output_dir=tmp_path_factory.mktemp("built"),
            model_settings={"batchSize": 4, "maxBatchDelay": 2, "responseTimeout": 30},
            serving={"backend": "pytorch", "precision": "fp32", "input_size_hw": [256, 320]},
        )
    ).path


@pytest.fixture
def archives(first_archive, tmp_path):
    """Makes archives that differ from the first in version and in one text of a file."""

    def make(version, member=None, old="", new=""):
        manifest = read_manifest(first_archive)
        manifest["model"]["modelVersion"] = version
        replaced = {MANIFEST_FILE: json.dumps(manifest).encode()}
        if member is not None:
            with opened_archive(first_archive) as opened:
                content = opened.read(member).decode()
            assert old in content
            replaced[member] = content.replace(old, new).encode()
        return copy_archive(first_archive, tmp_path / f"v{version}.mar", replaced)

    return make


@pytest.fixture(scope="module")
def served(first_archive, project_dir, tmp_path_factory):
    """A server with a model store of its own, which holds the first archive."""
    folder = tmp_path_factory.mktemp("served")
    store, logs = folder / "store", folder / "logs"
    store.mkdir()
    shutil.copy(first_archive, store / "damoyolo.mar")
    server = TorchServeProcess(
        project_dir / "config.properties",
        store,
        use_free_ports=True,
        log_dir=logs,
        arguments=["--enable-model-api"],
    )
    with server.running():
        yield served_by(server, store, logs)


def served_by(server, store, logs):
    options = ["--model-store", store, "--management-url", server.management_url]
    options += ["--metrics-url", server.metrics_url]
    change = ["--url", server.inference_url, "--server-log", logs / "torchserve.log"]
    return SimpleNamespace(
        store=store,
        management_url=server.management_url,
        url=f"{server.inference_url}/predictions/damoyolo",
        options=list(map(str, options)),
        change_options=list(map(str, change)),
    )


@pytest.fixture
def server_without_model_api(first_archive, project_dir, tmp_path):
    """A server as config.properties has it."""
    shutil.copy(first_archive, tmp_path / "damoyolo.mar")
    server = TorchServeProcess(project_dir / "config.properties", tmp_path, use_free_ports=True)
    with server.running():
        yield served_by(server, tmp_path, tmp_path)


@pytest.fixture
def run_deploy(served, capsys):
    """Runs the command in this process; gives exit code and everything printed."""

    def run(command, *arguments):
        options = served.options + (served.change_options if command != "status" else [])
        code = deploy.main([command, *map(str, arguments), *options])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture(scope="module")
def expected(first_archive, project_dir):
    """The sample images with the detections that every answer has to hold."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # as the server
    detector = load_detector(first_archive, device)
    options = detector.config.default_options()
    folder = project_dir / "tests/data/smears"
    images = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    found = [detector.detect([image], [options])[0] for image in images]
    detector.close()
    return list(zip(images, found, strict=True))


@contextmanager
def constant_load(url, expected, clients=CLIENTS):
    """Clients that send the images in turn, each answer checked; yields what went wrong and the latencies."""
    load = SimpleNamespace(problems=[], seconds=[])
    stopped = threading.Event()

    def send(client):
        turn = client
        with requests.Session() as session:
            while not stopped.is_set():
                image, found = expected[turn % len(expected)]
                turn += 1
                started = time.monotonic()
                try:
                    answer = session.post(url, data=image, timeout=TIMEOUT_S)
                    assert answer.status_code == 200, answer.text
                    assert_same_detections(answer.json(), found)
                except (requests.RequestException, AssertionError, ValueError) as error:
                    load.problems.append((time.monotonic(), repr(error)))
                load.seconds.append(time.monotonic() - started)
                stopped.wait(PAUSE_S)

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(send, client) for client in range(clients)]
        try:
            wait_until(lambda: len(load.seconds) >= clients, "the first answers")
            yield load
        finally:
            stopped.set()
    for future in futures:
        future.result()


def registered(served):
    """Workers of each registered version, and the default version."""
    answer = requests.get(f"{served.management_url}/models/damoyolo/all", timeout=TIMEOUT_S)
    versions = {each["modelVersion"]: len(each["workers"]) for each in answer.json()}
    return versions, describe_model(served.management_url, "damoyolo")["modelVersion"]


def startup_version(served):
    """The version that the server would load when it starts."""
    return read_manifest(served.store / "damoyolo.mar")["model"]["modelVersion"]


def test_update_scale_and_rollback_under_load_fail_no_request(served, run_deploy, archives, expected):
    _, first = registered(served)
    with constant_load(served.url, expected) as load:
        code, printed = run_deploy("update", archives("2.0"), "--workers", 2)
        assert code == 0, printed
        assert registered(served) == ({"2.0": 2}, "2.0")
        code, printed = run_deploy("scale", 1)
        assert code == 0, printed
        assert registered(served) == ({"2.1": 1}, "2.1")
        code, printed = run_deploy("rollback")
        assert code == 0, printed
        assert registered(served) == ({first: 1}, first)
    assert load.problems == []
    assert startup_version(served) == first
    code, printed = run_deploy("status")
    assert f"damoyolo {first} (default): 1 of 1 workers ready" in printed
    assert "rollback serves version 2.1" in printed


@pytest.mark.parametrize(
    ("member", "old", "new", "reason"),
    [
        pytest.param(
            "damoyolo_handler.py",
            "properties = context",
            'raise OSError("a fault of this test")\n        properties = context',
            "a fault of this test",
            id="its worker does not start",
        ),
        pytest.param(
            "model-config.yaml",
            "- Platelets\n  - RBC\n",
            "- RBC\n  - Platelets\n",
            "known objects",
            id="its classes are in another order",
        ),
        pytest.param(
            "damoyolo/detector.py",
            "self.pipeline.start(batch.pixels,",
            "self.pipeline.start(batch.pixels.flip(3),",
            "not as its archive does",
            id="its answers are not those of its weights",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_wrong_archive_is_refused_and_the_old_one_serves_on(
    served, run_deploy, archives, expected, member, old, new, reason
):
    before = registered(served)
    # As someone does who builds it over the archive that is served.
    shutil.copy(archives("1.0", member, old, new), served.store / "damoyolo.mar")
    with constant_load(served.url, expected) as load:
        code, printed = run_deploy("update", served.store / "damoyolo.mar")
    assert (code, load.problems) == (1, [])
    assert reason in printed
    assert registered(served) == before
    assert startup_version(served) == before[1]
    assert read_settings(served.store / "damoyolo.refused")


def start_deploy(served, project_dir, *arguments):
    """The command in a process of its own."""
    command = [sys.executable, "scripts/deploy.py", *map(str, arguments)]
    return subprocess.Popen(
        [*command, *served.options, *served.change_options],
        cwd=project_dir,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process, text):
    """What the process prints, up to a line with this text."""
    printed = ""
    for line in process.stdout:
        printed += line
        if text in line:
            return printed
    raise AssertionError(f"{text!r} is not in what was printed:\n{printed}")


@pytest.mark.slow
def test_what_a_killed_command_began_is_undone_before_the_switch_and_finished_after_it(
    served, run_deploy, archives, expected, project_dir
):
    versions, default = registered(served)
    archive = archives("7.0")
    with constant_load(served.url, expected) as load:
        with start_deploy(served, project_dir, "update", archive) as process:
            read_until(process, "waiting for")
            process.kill()
        assert registered(served)[1] == default
        code, printed = run_deploy("status")
        assert f"unfinished: version 7.0 in place of {default}" in printed
        code, printed = run_deploy("scale", versions[default])
        assert (code, registered(served)) == (0, (versions, default)), printed

        with start_deploy(served, project_dir, "update", archive) as process:
            read_until(process, "is the default")
            process.kill()
        code, printed = run_deploy("update", archive)
        assert code == 0
        assert f"finishing the change from version {default} to 7.0" in printed
        assert "is already served, as version 7.0" in printed
        assert registered(served) == ({"7.0": versions[default]}, "7.0")
    assert load.problems == []


@pytest.mark.slow
def test_ctrl_c_undoes_an_update_and_a_second_command_waits_its_turn(
    served, run_deploy, archives, project_dir
):
    before = registered(served)
    with start_deploy(served, project_dir, "update", archives("8.0")) as process:
        read_until(process, "waiting for")
        code, printed = run_deploy("scale", 3)
        assert (code, f"process {process.pid}" in printed) == (1, True), printed
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
        assert process.wait(TIMEOUT_S) == 130, printed
    assert registered(served) == before


@pytest.mark.slow
def test_a_version_that_clients_name_in_their_requests_is_not_removed(served, run_deploy, archives, expected):
    _, default = registered(served)
    with constant_load(f"{served.url}/{default}", expected, clients=1) as load:
        code, printed = run_deploy("update", archives("9.0"), "--idle-timeout", 5)
        assert (code, "clients still name it" in printed) == (1, True), printed
        assert registered(served)[1] == "9.0"
    assert load.problems == []
    code, printed = run_deploy("scale", 1)
    assert (code, set(registered(served)[0])) == (0, {"9.0"}), printed


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_deployments_under_constant_load_fail_no_request(
    served, run_deploy, archives, expected, capsys
):
    first, second = archives("20.0"), archives("21.0")
    commands = [("update", first), ("scale", 2), ("scale", 1), ("update", second), ("rollback",)] * 4
    rows = []
    with constant_load(served.url, expected) as load:
        idle = len(load.seconds)
        time.sleep(5)
        rows.append(("before", 5.0, load.seconds[idle:]))
        for command in commands:
            sent, started = len(load.seconds), time.monotonic()
            code, printed = run_deploy(*command)
            assert code == 0, printed
            rows.append((command[0], time.monotonic() - started, load.seconds[sent:]))
    with capsys.disabled():
        for name, seconds, latencies in rows:
            p50, p99 = np.percentile(latencies, (50, 99)) * 1e3
            print(f"{name}: {seconds:.1f} s, {len(latencies)} requests, p50 {p50:.0f} ms, p99 {p99:.0f} ms")
        print(f"{len(load.seconds)} requests, {len(load.problems)} failed or changed")
    assert load.problems == []


@pytest.mark.slow
def test_a_server_that_does_not_register_archives_is_named_with_the_option_that_allows_it(
    server_without_model_api, first_archive, capsys
):
    served = server_without_model_api
    code = deploy.main(["update", str(first_archive), *served.options, *served.change_options])
    printed = capsys.readouterr().err
    assert (code, "serve.py --enable-model-api" in printed) == (1, True), printed
