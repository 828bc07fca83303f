"""The servers that are compared: each starts by its name with the same archive and the same settings."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lib.archive.members import BatchingSetting, archive_with_setting, empty_archive, read_manifest
from lib.archive.reader import unpacked
from lib.measure.plain.archive import plain_archive
from lib.measure.request_forms import BASE64_JSON, OBJECT_DETECTOR, RAW, TENSORS, RequestForm
from lib.paths import PROJECT_DIR
from lib.server.command_server import running_command
from lib.server.process import free_ports
from lib.server.served_archive import START_TIMEOUT_S, serve_archive


@dataclass(frozen=True)
class Bench:
    """What all servers have in common.

    device: "cpu" or "cuda". environment: variables for the servers.
    answer_bytes: of the empty handler.
    api_servers: processes of LitServe that read requests; None are as many as workers.
    """

    archive: Path
    setting: BatchingSetting
    device: str
    environment: Mapping[str, str]
    answer_bytes: int
    api_servers: int | None = None


@dataclass(frozen=True)
class RunningServer:
    """A server that is ready. start_s: from its command to its readiness."""

    url: str
    start_s: float


@dataclass(frozen=True)
class Server:
    """A server by its title in the table.

    start: a context in which it runs. form: of its requests; None for one whose answers mean nothing.
    """

    title: str
    start: Callable[[Bench], AbstractContextManager[RunningServer]]
    form: RequestForm | None


@contextlib.contextmanager
def _torchserve(bench: Bench, make: Callable[[Path, Path, BatchingSetting], Path]) -> Iterator[RunningServer]:
    with tempfile.TemporaryDirectory(prefix="model-store-") as folder:
        changed = make(bench.archive, Path(folder), bench.setting)
        started_s = time.monotonic()
        with serve_archive(changed, _visible(bench)) as served:
            yield RunningServer(served.predictions_url, time.monotonic() - started_s)


def _project(bench: Bench) -> AbstractContextManager[RunningServer]:
    return _torchserve(bench, archive_with_setting)


def _object_detector(bench: Bench) -> AbstractContextManager[RunningServer]:
    return _torchserve(bench, plain_archive)


def _empty(bench: Bench) -> AbstractContextManager[RunningServer]:
    return _torchserve(
        bench, lambda archive, folder, setting: empty_archive(archive, folder, setting, bench.answer_bytes)
    )


@contextlib.contextmanager
def _deployed(bench: Bench, name: str, ready: str, path: str, *further: str) -> Iterator[RunningServer]:
    """A serve.py of deploy/, with the archive that TorchServe gets."""
    port = next(port for port in free_ports(50) if port <= 65000)  # Triton takes the next ones too
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="model-store-") as folder:
        changed = archive_with_setting(bench.archive, Path(folder), bench.setting)
        command = [sys.executable, f"{PROJECT_DIR}/deploy/{name}/serve.py", "--archive", str(changed)]
        command += ["--port", str(port), "--device", bench.device, "--workers", str(bench.setting.workers)]
        command += ["--batch-size", str(bench.setting.batch_size)]
        command += ["--max-batch-delay", str(bench.setting.delay_ms), *further]
        with running_command(command, url + ready, START_TIMEOUT_S, bench.environment) as start_s:
            yield RunningServer(url + path, start_s)


def _litserve(bench: Bench) -> AbstractContextManager[RunningServer]:
    further = ["--api-servers", str(bench.api_servers)] if bench.api_servers else []
    return _deployed(bench, "litserve", "/health", "/predict", *further)


def _triton(bench: Bench) -> AbstractContextManager[RunningServer]:
    model = read_manifest(bench.archive)["model"]["modelName"]
    return _deployed(bench, "triton", "/v2/health/ready", f"/v2/models/{model}/infer")


@contextlib.contextmanager
def _plain_litserve(bench: Bench, setting: BatchingSetting) -> Iterator[RunningServer]:
    (port,) = free_ports(1)
    with unpacked(bench.archive) as folder:
        command = [sys.executable, "-m", "lib.measure.plain.litserve_app", str(folder), bench.device]
        command += map(str, (port, setting.workers, setting.batch_size, setting.delay_ms))
        path = os.pathsep.join(filter(None, [str(PROJECT_DIR / "scripts"), os.environ.get("PYTHONPATH")]))
        environment = {**bench.environment, "PYTHONPATH": path}
        url = f"http://127.0.0.1:{port}"
        with running_command(command, f"{url}/health", START_TIMEOUT_S, environment) as start_s:
            yield RunningServer(f"{url}/predict", start_s)


def _plain_litserve_batches(bench: Bench) -> AbstractContextManager[RunningServer]:
    return _plain_litserve(bench, bench.setting)


def _plain_litserve_single(bench: Bench) -> AbstractContextManager[RunningServer]:
    """With LitServe's defaults: no batches, one worker."""
    return _plain_litserve(bench, BatchingSetting(1, 1, 1))


def _visible(bench: Bench) -> dict[str, str]:
    """TorchServe takes a GPU where it sees one."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if bench.device == "cpu" else {}
    return {**bench.environment, **hidden}


SERVERS = {
    "torchserve": Server("TorchServe", _project, RAW),
    "triton": Server("Triton", _triton, TENSORS),
    "litserve": Server("LitServe", _litserve, RAW),
    "empty": Server("TorchServe, empty handler", _empty, None),
    "plain-litserve": Server("plain LitServe, one by one", _plain_litserve_single, BASE64_JSON),
    "plain-litserve-batches": Server("plain LitServe, batches", _plain_litserve_batches, BASE64_JSON),
    "plain-torchserve": Server("TorchServe's object_detector", _object_detector, OBJECT_DETECTOR),
}
