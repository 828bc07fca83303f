"""Material that many tests share."""

import os
import signal
from pathlib import Path

import pytest

PROJECT_DIR = Path(__file__).resolve().parents[1]
# A shell lets what it starts in the background ignore Ctrl-C, and every command of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def project_dir():
    """The project's root."""
    return PROJECT_DIR


@pytest.fixture(scope="session")
def shared_dir():
    """The folder of reference material: goldens, further weights, evaluation images."""
    folder = Path(os.environ.get("DAMOYOLO_SHARED", PROJECT_DIR.parent / "shared"))
    if not (folder / "model").is_dir():
        pytest.skip(f"no reference material in {folder}; set DAMOYOLO_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def client_python():
    """The Python of .venv-clients, which has the clients of other projects (tests/clients)."""
    python = PROJECT_DIR / ".venv-clients" / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv-clients; ./scripts/test.sh makes it")
    return python


@pytest.fixture(scope="session")
def demo_model():
    """The demo network, folded, on the CPU, in float32; not to be changed."""
    from lib.packaging.class_names import DEMO_CLASS_NAMES
    from lib.packaging.weights import folded_network
    from lib.paths import DEMO_WEIGHTS

    return folded_network(DEMO_WEIGHTS, None, len(DEMO_CLASS_NAMES))


@pytest.fixture(scope="session")
def demo_onnx(demo_model, tmp_path_factory):
    """The ONNX file of the demo network with raw predictions, in float32; not to be changed."""
    from lib.onnx.export import export_onnx
    from lib.packaging.class_names import DEMO_CLASS_NAMES

    path = tmp_path_factory.mktemp("onnx") / "demo.onnx"
    export_onnx(demo_model, path, class_names=DEMO_CLASS_NAMES)
    return path


@pytest.fixture(scope="session")
def demo_network(demo_onnx):
    """The content of `demo_onnx`; not to be changed."""
    import onnx

    return onnx.load(demo_onnx)


@pytest.fixture(scope="session")
def smear_pixels():
    """(3, 3, 256, 320) uint8 RGB: the sample images, small."""
    from lib.onnx.quantization import image_paths, read_pixels

    return read_pixels(image_paths(PROJECT_DIR / "tests/data/smears", at_most=3), "S", (256, 320))
