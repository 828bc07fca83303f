"""scripts/serve.py whose output breaks, whose disk is full, which is killed, or whose archive is damaged."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from lib.server.dropping_output import DroppingOutput
from lib.server.process import TorchServeProcess

from doubles.echo_handler import write_echo_archive
from doubles.real_server import config_with_free_ports, wait_until
from doubles.served_command import ServedCommand, still_running

TIMEOUT_S = 60.0
LINES = 700  # with the rest of each line, more than a pipe holds


@pytest.fixture
def command(project_dir, tmp_path):
    """serve.py with the echo handler, not started."""
    write_echo_archive(tmp_path / "damoyolo.mar", "damoyolo")
    command = ServedCommand(project_dir, tmp_path)
    try:
        yield command
    finally:
        if command.process is not None and command.process.poll() is None:
            command.stop()


def ask(url, **fields):
    return requests.post(url, files={"data": b"image"}, data=fields, timeout=TIMEOUT_S).status_code


def ask_in_vain(url, **fields):
    with contextlib.suppress(requests.RequestException):
        ask(url, **fields)


def write_many_lines_and_go_on(url):
    """The statuses of requests that write more log than the pipes on its way hold, and of some afterwards."""
    return [ask(url, lines=LINES) for _ in range(2)] + [ask(url) for _ in range(5)]


@contextlib.contextmanager
def closed_pipe():
    """As the standard output of `serve.py | head -1`."""
    reading, writing = os.pipe()
    with open(writing, "wb") as file:
        os.close(reading)
        yield file


@contextlib.contextmanager
def blocked_pipe():
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with open(reading, "rb"), open(writing, "wb") as file:
        yield file


@contextlib.contextmanager
def full_disk():
    with open("/dev/full", "wb") as file:
        yield file


@pytest.mark.parametrize("output", [closed_pipe, blocked_pipe, full_disk])
def test_service_and_log_file_go_on_when_the_output_takes_nothing(command, project_dir, output):
    log_file = project_dir / "logs/torchserve.log"
    before = log_file.stat().st_size if log_file.exists() else 0
    with output() as file:
        command.start(file)
        assert write_many_lines_and_go_on(command.url) == [200] * 7
        assert command.stop() == 0
    with log_file.open() as log:
        log.seek(before if log_file.stat().st_size >= before else 0)
        assert f"line {LINES - 1} " in log.read()


def test_service_goes_on_when_the_disk_of_the_log_file_is_full(project_dir, tmp_path):
    write_echo_archive(tmp_path / "damoyolo.mar", "damoyolo")
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "torchserve.log").symlink_to("/dev/full")
    config = project_dir / "config.properties"
    with (tmp_path / "printed").open("w") as printed:
        echo = DroppingOutput(printed)
        server = TorchServeProcess(config, tmp_path, use_free_ports=True, log_dir=logs, echo=echo)
        with server.running(120.0):
            assert write_many_lines_and_go_on(f"{server.inference_url}/predictions/damoyolo") == [200] * 7
        echo.flush()
        assert "No space left on device" in (tmp_path / "printed").read_text()


def test_nothing_is_left_of_a_killed_serve_and_the_next_one_starts(command, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command.start(**environment)
    assert list(temporary.iterdir())
    started = command.processes()
    assert {"java"} < {process.name() for process in started}
    with ThreadPoolExecutor(4) as pool:  # requests under way do not hold it
        for _ in range(4):
            pool.submit(ask_in_vain, command.url, sleep=5)
        time.sleep(0.5)
        command.signal(signal.SIGKILL)
        command.process.wait()
        wait_until(lambda: not still_running(started), "the end of all processes", 5.0)
    wait_until(lambda: not list(temporary.iterdir()), "the end of the temporary folder", 5.0)
    command.start(**environment)
    assert ask(command.url) == 200
    assert command.stop() == 0
    assert not list(temporary.iterdir())


def test_mps_ends_with_a_killed_serve(command, tmp_path):
    log = tmp_path / "mps.log"
    program = tmp_path / "bin" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@ [$(cat)] $CUDA_MPS_PIPE_DIRECTORY" >>{log}\n')
    program.chmod(0o755)
    command.options = ("--mps",)
    command.start(**{**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"})
    command.signal(signal.SIGKILL)
    command.process.wait()
    wait_until(lambda: len(log.read_text().splitlines()) == 2, "the end of MPS", 30.0)
    folder = Path(log.read_text().split()[-1]).parent
    assert "[quit -t 10]" in log.read_text()
    wait_until(lambda: not folder.exists(), "the end of its folder", 5.0)


def keep_asking(url):
    """Statuses of one request after another, until one is not 200."""
    statuses = [200]
    while statuses[-1] == 200:
        statuses.append(ask(url, sleep=0.05))
    return statuses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_under_load_loses_no_request(command, number):
    command.start()
    started = command.processes()
    with ThreadPoolExecutor(9) as pool:
        slow = pool.submit(ask, command.url, sleep=3)
        clients = [pool.submit(keep_asking, command.url) for _ in range(8)]
        time.sleep(1.0)
        command.signal(number)
        assert slow.result() == 200
        assert [client.result()[-1] for client in clients] == [503] * 8
    assert command.process.wait(60) == 0
    assert not still_running(started)
    assert f"serve: {number.name}" in command.printed()


def test_a_server_started_with_nohup_outlives_its_terminal(command):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    command.signal(signal.SIGHUP)
    time.sleep(0.5)
    assert ask(command.url) == 200


def test_a_second_signal_ends_all_at_once(command):
    command.start()
    started = command.processes()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ask_in_vain, command.url, sleep=30)
        time.sleep(1.0)
        command.signal(signal.SIGTERM)
        time.sleep(1.0)
        command.signal(signal.SIGINT)
        assert command.process.wait(10) == 1
    assert not still_running(started)
    assert "requests under way are lost" in command.printed()


def test_serve_ends_with_an_error_when_a_model_has_lost_its_workers_for_good(command, tmp_path):
    write_echo_archive(tmp_path / "damoyolo.mar", "damoyolo", maxRetryTimeoutInSec=0)
    command.start()
    started = command.processes()
    ask_in_vain(command.url, exit=1)
    assert command.process.wait(60) == 1
    assert not still_running(started)
    assert "serve: a model has lost all its workers for good" in command.printed()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def no_zip(path):
    path.write_bytes(b"this is no archive")


def changed_byte(path):
    content = path.read_bytes()
    place = content.index(b"batchSize: 4")
    path.write_bytes(content[:place] + b"B" + content[place + 1 :])


def without(name):
    def remove(path):
        with zipfile.ZipFile(path) as old:
            kept = {each: old.read(each) for each in old.namelist() if each != name}
        with zipfile.ZipFile(path, "w") as new:
            for each, content in kept.items():
                new.writestr(each, content)

    return remove


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "File is not a zip file"),
        (no_zip, "File is not a zip file"),
        (changed_byte, "model-config.yaml is damaged"),
        (without("MAR-INF/MANIFEST.json"), "MANIFEST.json"),
        (without("echo_handler.py"), "lacks echo_handler.py"),
    ],
)
def test_a_damaged_archive_is_reported_in_one_line(project_dir, tmp_path, damage, reason):
    write_echo_archive(tmp_path / "damoyolo.mar", "damoyolo")
    damage(tmp_path / "damoyolo.mar")
    config, _ = config_with_free_ports(project_dir, tmp_path)
    command = [sys.executable, "scripts/serve.py", "--ts-config", str(config), "--model-store", str(tmp_path)]
    serve = subprocess.run(command, cwd=project_dir, capture_output=True, text=True, timeout=60)
    assert serve.returncode == 1
    (line,) = serve.stderr.splitlines()
    assert "damoyolo.mar" in line
    assert reason in line
    assert not serve.stdout
