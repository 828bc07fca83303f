"""Variants of a built archive for measuring: other batching settings, or a handler that does nothing."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lib.archive.members import BatchingSetting, archive_with_setting, empty_archive
from lib.paths import PROJECT_DIR
from lib.server.process import TorchServeProcess, model_name_of


@dataclass(frozen=True)
class ServedModel:
    """Where a running server answers for a model."""

    inference_url: str
    management_url: str
    metrics_url: str
    model_name: str

    @property
    def predictions_url(self) -> str:
        """Where images are sent."""
        return f"{self.inference_url}/predictions/{self.model_name}"


@contextlib.contextmanager
def serve_archive(
    archive: Path, environment: Mapping[str, str] | None = None, timeout_s: float = 600.0
) -> Iterator[ServedModel]:
    """A TorchServe with the project's settings on free ports that serves the archive; ended afterwards.

    environment: variables for the server and its workers, beside those of this process.

    Raises:
        ServerStartError, FileNotFoundError: it does not start.
    """
    server = TorchServeProcess(
        PROJECT_DIR / "config.properties",
        archive.resolve().parent,
        working_dir=PROJECT_DIR,
        overrides={"load_models": archive.name},
        use_free_ports=True,
        environment=environment,
    )
    try:
        server.start()
        server.wait_until_ready(timeout_s)
        yield ServedModel(
            server.inference_url, server.management_url, server.metrics_url, model_name_of(archive)
        )
    finally:
        server.stop()


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
def serve_empty(archive: Path, setting: BatchingSetting, answer_bytes: int) -> Iterator[ServedModel]:
    """The empty handler served in the archive's place, with this batching setting."""
    with (
        tempfile.TemporaryDirectory(prefix="model-store-") as folder,
        serve_archive(empty_archive(archive, Path(folder), setting, answer_bytes)) as served,
    ):
        yield served
