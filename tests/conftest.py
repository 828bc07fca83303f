"""Where the tests find their material."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

PROJECT_DIR = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project_dir() -> Path:
    """The project's root."""
    return PROJECT_DIR


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference material: goldens, further weights, evaluation images."""
    folder = Path(os.environ.get("DAMOYOLO_SHARED", PROJECT_DIR.parent / "shared"))
    if not (folder / "model").is_dir():
        pytest.skip(f"no reference material in {folder}; set DAMOYOLO_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def demo_network() -> onnx.ModelProto:
    """The demo network as scripts/export_onnx.py writes it, in float32; not to be changed."""
    from lib.onnx.quantization import export_network
    from lib.packaging.class_names import DEMO_CLASS_NAMES
    from lib.packaging.weights import folded_network
    from lib.paths import DEMO_WEIGHTS

    return export_network(folded_network(DEMO_WEIGHTS, None, len(DEMO_CLASS_NAMES)), DEMO_CLASS_NAMES)


@pytest.fixture(scope="session")
def smear_pixels() -> NDArray[np.uint8]:
    """(3, 3, 256, 320) uint8 RGB: the sample images, small."""
    from lib.onnx.quantization import image_paths, read_pixels

    return read_pixels(image_paths(PROJECT_DIR / "tests/data/smears", at_most=3), "S", (256, 320))
