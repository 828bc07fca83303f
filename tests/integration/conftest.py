"""One real TorchServe for all integration tests, from an archive that is built for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lib.archive.reader import load_detector
from lib.packaging.builder import ArchiveReport, ArchiveRequest, build_archive
from lib.server.process import TorchServeProcess

from damoyolo.detector import Detector
from doubles.answers import BACKEND, ONNX, PRECISION

INTEGRATION_DIR = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INTEGRATION_DIR in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def smears(project_dir: Path) -> dict[str, tuple[bytes, list[list[object]]]]:
    """Sample images by name: encoded bytes, and [label, x1, y1, x2, y2] of each cell in pixels."""
    folder = project_dir / "tests" / "data" / "smears"
    return {
        path.stem: (path.read_bytes(), json.loads(path.with_suffix(".json").read_text()))
        for path in sorted(folder.glob("*.jpg"))
    }


@pytest.fixture(scope="session")
def smear(smears: dict[str, tuple[bytes, list[list[object]]]]) -> bytes:
    """One sample image, 640x480 JPEG."""
    return smears["smear_3"][0]


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> ArchiveReport:
    """The archive of the demo weights, with a delay long enough for concurrent requests to share batches."""
    return build_archive(
        ArchiveRequest(
            onnx=Path(ONNX) if ONNX else None,
            output_dir=tmp_path_factory.mktemp("model_store"),
            model_settings={"batchSize": 8, "maxBatchDelay": 100},
            serving={"backend": BACKEND, "precision": PRECISION, "max_image_pixels": 20_000_000},
        )
    )


@pytest.fixture(scope="session")
def server(archive: ArchiveReport, project_dir: Path) -> Iterator[TorchServeProcess]:
    """A TorchServe that serves the archive, on free ports."""
    with TorchServeProcess(
        project_dir / "config.properties",
        archive.path.parent,
        working_dir=project_dir,
        use_free_ports=True,
        arguments=["--enable-model-api"],
    ) as running:
        yield running


@pytest.fixture(scope="session")
def url(server: TorchServeProcess) -> str:
    """Where predictions are asked for."""
    return f"{server.inference_url}/predictions/damoyolo"


@pytest.fixture(scope="session")
def detector(archive: ArchiveReport) -> Detector:
    """The same archive in this process, on the device that the server uses."""
    return load_detector(archive.path, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
