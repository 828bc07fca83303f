"""One real TorchServe for all integration tests: scripts/serve.py on an archive that is built for them."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib.archive.reader import load_detector
from lib.packaging.builder import ArchiveRequest, build_archive
from lib.server.served_archive import ServedModel

from doubles.answers import BACKEND, ONNX, PRECISION
from doubles.container_image import Podman, build_image, skip_without_podman
from doubles.real_server import config_with_free_ports, ports_in_use, wait_until

INTEGRATION_DIR = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if INTEGRATION_DIR in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def smears(project_dir):
    """Sample images by name: encoded bytes, and [label, x1, y1, x2, y2] of each cell in pixels."""
    folder = project_dir / "tests" / "data" / "smears"
    return {
        path.stem: (path.read_bytes(), json.loads(path.with_suffix(".json").read_text()))
        for path in sorted(folder.glob("*.jpg"))
    }


@pytest.fixture(scope="session")
def smear(smears):
    """One sample image, 640x480 JPEG."""
    return smears["smear_3"][0]


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
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
def server(archive, project_dir, tmp_path_factory):
    """The archive served on free ports by scripts/serve.py, whose start and end are checked, too."""
    folder = tmp_path_factory.mktemp("serve")
    config, addresses = config_with_free_ports(project_dir, folder)
    output, ready_file = folder / "output.txt", folder / "ready"
    command = [sys.executable, "scripts/serve.py", "--ts-config", str(config), "--enable-model-api"]
    command += ["--model-store", str(archive.path.parent), "--ready-file", str(ready_file)]
    with output.open("w") as file:
        serve = subprocess.Popen(command, cwd=project_dir, stdout=file, stderr=subprocess.STDOUT)

    def is_ready():
        assert serve.poll() is None, output.read_text()
        return ready_file.exists() and bool(ready_file.read_text())

    try:
        wait_until(is_ready, "the server being ready")
        assert ready_file.read_text().strip() == addresses[0]
        yield ServedModel(*addresses, "damoyolo")
    finally:
        serve.send_signal(signal.SIGTERM)
        serve.wait(60)
    assert serve.returncode == 0
    assert f"curl --max-time 60 -X POST {addresses[0]}/predictions/damoyolo" in output.read_text()
    assert not ports_in_use(addresses)


@pytest.fixture(scope="session")
def url(server):
    """Where images are sent."""
    return server.predictions_url


@pytest.fixture(scope="session")
def detector(archive):
    """The same archive in this process, on the device that the server uses."""
    return load_detector(archive.path, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def podman(project_dir):
    """Podman with the image of deploy/container, which takes some two minutes to build."""
    skip_without_podman()
    podman = Podman()
    try:
        podman.built = build_image(podman, project_dir)
        yield podman
    finally:
        podman.close()
