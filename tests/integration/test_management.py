"""Workers scaled and versions registered through the management API of a real TorchServe."""

import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import requests

from lib.cli import ScriptError
from lib.server.process import TorchServeProcess

from doubles.real_server import wait_until

TIMEOUT_S = 120.0


@contextmanager
def load(url, encoded, clients):
    """Clients that send one request after another; yields their growing list of statuses and errors.

    On leaving, every request that was sent has its answer.
    """
    outcomes = []
    stopped = threading.Event()

    def send():
        while not stopped.is_set():
            try:
                outcomes.append(requests.post(url, data=encoded, timeout=TIMEOUT_S).status_code)
            except requests.RequestException as error:
                outcomes.append(error)

    with ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            pool.submit(send)
        try:
            yield outcomes
        finally:
            stopped.set()


def edited_archive(source, target, edits):
    """A copy of an archive with a text of some of its files replaced."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if name in edits:
                old, new = (text.encode() for text in edits[name])
                assert old in content
                content = content.replace(old, new)
            after.writestr(name, content)


@pytest.mark.slow
def test_scaling_up_under_load_and_down_in_a_pause_of_it_fails_no_request(server, url, smear):
    with load(url, smear, clients=4) as before:
        wait_until(lambda: len(before) >= 4, "the first answers")
        server.scale(2)
        enough = len(before) + 8
        wait_until(lambda: len(before) >= enough, "answers of two workers")
    # Down only without requests under way: TorchServe ends a worker whatever it is doing, and what it was
    # collecting or computing may be lost (docs/operations.md).
    server.scale(1)
    with load(url, smear, clients=4) as after:
        wait_until(lambda: len(after) >= 4, "answers after scaling down")
    assert set(before + after) == {200}


@pytest.mark.slow
def test_a_second_version_is_served_next_to_the_first(server, url, smear, archive):
    edits = {
        "MAR-INF/MANIFEST.json": ('"modelVersion": "1.0"', '"modelVersion": "2.0"'),
        "model-config.yaml": ("handler:\n", "handler:\n  max_detections: 1\n"),
    }
    edited_archive(archive.path, archive.path.with_name("damoyolo_2.mar"), edits)
    models_url, first = f"{server.management_url}/models", requests.post(url, data=smear, timeout=TIMEOUT_S)
    registered = requests.post(
        f"{models_url}?url=damoyolo_2.mar&initial_workers=1&synchronous=true", timeout=TIMEOUT_S
    )
    assert registered.status_code == 200, registered.text
    try:
        second = requests.post(f"{url}/2.0", data=smear, timeout=TIMEOUT_S).json()
        assert second["detections"] == first.json()["detections"][:1]
        for address in (url, f"{url}/1.0"):
            assert requests.post(address, data=smear, timeout=TIMEOUT_S).json() == first.json()
    finally:
        requests.delete(f"{models_url}/damoyolo/2.0", timeout=TIMEOUT_S)
    assert requests.post(f"{url}/2.0", data=smear, timeout=TIMEOUT_S).status_code == 404


def start_failure(store, project_dir):
    """The message of a server that cannot start, and after how many seconds."""
    started = time.monotonic()
    server = TorchServeProcess(project_dir / "config.properties", store, use_free_ports=True)
    with pytest.raises(ScriptError) as raised, server.running():
        pass
    return str(raised.value), time.monotonic() - started


def test_a_worker_that_cannot_start_is_reported_with_its_traceback_within_seconds(
    archive, tmp_path, project_dir
):
    edits = {"model-config.yaml": ("variant: S", "variant: T")}
    edited_archive(archive.path, tmp_path / "damoyolo.mar", edits)
    message, seconds = start_failure(tmp_path, project_dir)
    assert "Traceback" in message
    assert "the settings are for variant T" in message
    assert seconds < 60


def test_a_missing_archive_is_reported_before_anything_starts(tmp_path, project_dir):
    message, seconds = start_failure(tmp_path, project_dir)
    assert "build_archive.py" in message
    assert seconds < 5


def test_a_taken_port_is_reported_before_anything_starts(server, archive, project_dir):
    overrides = {"inference_address": server.inference_url}
    second = TorchServeProcess(project_dir / "config.properties", archive.path.parent, overrides=overrides)
    with pytest.raises(ScriptError, match=rf"port .*{server.inference_url.rsplit(':', 1)[1]}"):
        second.start()
