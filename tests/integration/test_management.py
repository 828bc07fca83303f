"""Workers scaled and versions registered through the management API of a real TorchServe."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from lib.packaging.builder import ArchiveReport, ArchiveRequest, build_archive
from lib.server.process import ServerStartError, TorchServeProcess

TIMEOUT_S = 120.0


class Load:
    """Clients that ask without pause until told to stop."""

    def __init__(self, url: str, encoded: bytes, clients: int) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._url, self._encoded = url, encoded
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._in_flight = 0
        self._flowing = threading.Event()
        self._flowing.set()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def pause(self) -> None:
        """Return when no request is under way any more; none is sent until `resume`."""
        self._flowing.clear()
        wait_until(lambda: self._in_flight == 0, "the last answers before a pause")

    def resume(self) -> None:
        """Let the clients ask again."""
        self._flowing.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                asks = self._flowing.is_set()
                self._in_flight += asks
            if not asks:
                self._flowing.wait(0.1)
                continue
            try:
                response = requests.post(self._url, data=self._encoded, timeout=TIMEOUT_S)
                failure = (
                    "" if response.status_code == 200 else f"{response.status_code} {response.text[:200]}"
                )
            except requests.RequestException as error:
                failure = repr(error)
            with self._lock:
                self.answered += 1
                self._in_flight -= 1
                if failure:
                    self.failures.append(failure)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:.0f} s"
        time.sleep(0.2)


def scale(server: TorchServeProcess, workers: int) -> None:
    """Ask for so many workers and wait until they are there."""
    response = requests.put(
        f"{server.management_url}/models/damoyolo?min_worker={workers}&max_worker={workers}",
        timeout=TIMEOUT_S,
    )
    assert response.status_code in (200, 202), response.text
    wait_until(
        lambda: server.is_ready("damoyolo") and len(server.describe("damoyolo")["workers"]) == workers,
        f"scaling to {workers}",
    )


def test_scaling_up_under_load_and_down_in_a_pause_of_it_fails_no_request(
    server: TorchServeProcess, url: str, smear: bytes
) -> None:
    # Down only without requests under way: TorchServe ends a worker whatever it is doing, and what it was
    # collecting or computing may be lost (README, "Operate").
    with Load(url, smear, clients=16) as load:
        wait_until(lambda: load.answered >= 8, "the first answers")
        scale(server, 2)
        at_least = load.answered + 16
        wait_until(lambda: load.answered >= at_least, "answers of two workers")
        load.pause()
        scale(server, 1)
        load.resume()
        at_least = load.answered + 8
        wait_until(lambda: load.answered >= at_least, "answers after scaling down")
    assert load.failures == []


def test_a_second_version_is_served_next_to_the_first(
    server: TorchServeProcess, url: str, smear: bytes, archive: ArchiveReport, tmp_path: Path
) -> None:
    built = build_archive(
        ArchiveRequest(version="2.0", output_dir=tmp_path, serving={"precision": "fp32", "max_detections": 1})
    )
    shutil.copy(built.path, archive.path.parent / "damoyolo_2.mar")
    first = requests.post(url, data=smear, timeout=TIMEOUT_S).json()
    registered = requests.post(
        f"{server.management_url}/models?url=damoyolo_2.mar&initial_workers=1&synchronous=false",
        timeout=TIMEOUT_S,
    )
    assert registered.status_code in (200, 202), registered.text
    try:
        wait_until(lambda: server.is_ready("damoyolo", "2.0"), "version 2.0 being ready")
        second = requests.post(f"{url}/2.0", data=smear, timeout=TIMEOUT_S).json()
        assert second["detections"] == first["detections"][:1]
        for address in (url, f"{url}/1.0"):
            assert requests.post(address, data=smear, timeout=TIMEOUT_S).json() == first
    finally:
        requests.delete(f"{server.management_url}/models/damoyolo/2.0", timeout=TIMEOUT_S)
    assert requests.post(f"{url}/2.0", data=smear, timeout=TIMEOUT_S).status_code == 404


def start_failure(store: Path, project_dir: Path, **settings: Any) -> tuple[str, float]:
    """What a server says that cannot start, and after how many seconds."""
    started = time.monotonic()
    with (
        pytest.raises(ServerStartError) as raised,
        TorchServeProcess(
            project_dir / "config.properties", store, working_dir=project_dir, use_free_ports=True, **settings
        ),
    ):
        pass
    return str(raised.value), time.monotonic() - started


def test_a_worker_that_cannot_start_is_reported_with_its_traceback_within_seconds(
    archive: ArchiveReport, tmp_path: Path, project_dir: Path
) -> None:
    import zipfile

    with zipfile.ZipFile(archive.path) as good, zipfile.ZipFile(tmp_path / "damoyolo.mar", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            bad.writestr(
                name, content.replace(b"variant: S", b"variant: T") if name.endswith(".yaml") else content
            )
    message, seconds = start_failure(tmp_path, project_dir)
    assert "Traceback" in message
    assert "the settings are for variant T" in message
    assert seconds < 60


def test_a_missing_archive_is_reported_before_anything_starts(tmp_path: Path, project_dir: Path) -> None:
    message, seconds = start_failure(tmp_path, project_dir)
    assert "build_archive.py" in message
    assert seconds < 5


def test_a_taken_port_is_reported_before_anything_starts(
    server: TorchServeProcess, archive: ArchiveReport, project_dir: Path
) -> None:
    overrides = {"inference_address": server.inference_url}
    second = TorchServeProcess(
        project_dir / "config.properties", archive.path.parent, working_dir=project_dir, overrides=overrides
    )
    with pytest.raises(ServerStartError, match=rf"port .*{server.inference_url.rsplit(':', 1)[1]}"):
        second.start()
