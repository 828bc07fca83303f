"""Serve an archive for measuring: as it is, with other batching settings, or with an empty handler."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.archive.members import BatchingSetting, archive_with_setting, empty_archive, read_manifest
from lib.cli import ScriptError
from lib.paths import PROJECT_DIR
from lib.server.gpus import workers_per_gpu
from lib.server.local_http import direct_session
from lib.server.process import HTTP_TIMEOUT_S, TorchServeProcess, describe_model

START_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class ServedModel:
    """A model of a running server."""

    inference_url: str
    management_url: str
    metrics_url: str
    model_name: str

    @property
    def predictions_url(self) -> str:
        """Where images are sent."""
        return f"{self.inference_url}/predictions/{self.model_name}"

    def batching(self) -> dict[str, Any]:
        """Batching settings, number of workers, and their number on each GPU."""
        description = describe_model(self.management_url, self.model_name)
        return {
            "batch_size": description["batchSize"],
            "delay_ms": description["maxBatchDelay"],
            "workers": len(description["workers"]),
            "workers_per_gpu": workers_per_gpu(description),
        }

    def scale(self, workers: int, timeout_s: float = 300.0) -> None:
        """Change the number of workers; returns when all have loaded the model.

        Raises:
            ScriptError: they have not within the time.
        """
        with direct_session() as session:
            session.put(
                f"{self.management_url}/models/{self.model_name}",
                params={"min_worker": str(workers), "max_worker": str(workers)},
                timeout=HTTP_TIMEOUT_S,
            ).raise_for_status()
        deadline = time.monotonic() + timeout_s
        while True:
            description = describe_model(self.management_url, self.model_name)
            states = [worker["status"] for worker in description["workers"]]
            if states == ["READY"] * workers:
                return
            if time.monotonic() > deadline:
                raise ScriptError(f"{workers} workers requested; after {timeout_s:.0f} s they are {states}")
            time.sleep(0.2)


@contextlib.contextmanager
def serve_archive(archive: Path, environment: Mapping[str, str] | None = None) -> Iterator[ServedModel]:
    """A TorchServe with the project's settings on free ports that serves the archive; ended afterwards.

    environment: variables for the server and its workers, in addition to those of this process.

    Raises:
        ScriptError, FileNotFoundError: it does not start.
    """
    model_name = read_manifest(archive)["model"]["modelName"]
    server = TorchServeProcess(
        PROJECT_DIR / "config.properties",
        archive.resolve().parent,
        overrides={"load_models": archive.name},
        use_free_ports=True,
        environment=environment,
    )
    with server.running(START_TIMEOUT_S):
        yield ServedModel(server.inference_url, server.management_url, server.metrics_url, model_name)


@contextlib.contextmanager
def serve_with_setting(
    archive: Path, setting: BatchingSetting, environment: Mapping[str, str] | None = None
) -> Iterator[ServedModel]:
    """The archive served with another batching setting."""
    with tempfile.TemporaryDirectory(prefix="model-store-") as folder:
        changed = archive_with_setting(archive, Path(folder), setting)
        with serve_archive(changed, environment) as served:
            yield served


@contextlib.contextmanager
def serve_empty(
    archive: Path, setting: BatchingSetting, answer_bytes: int, environment: Mapping[str, str] | None = None
) -> Iterator[ServedModel]:
    """The empty handler served in the archive's place, with this batching setting."""
    with (
        tempfile.TemporaryDirectory(prefix="model-store-") as folder,
        serve_archive(empty_archive(archive, Path(folder), setting, answer_bytes), environment) as served,
    ):
        yield served
