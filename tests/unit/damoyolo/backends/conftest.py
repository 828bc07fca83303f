"""A small network and the files of it that the backends open."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lib.onnx.export import export_onnx

from damoyolo.backends import ONNX_FILE, Backend, open_backend
from damoyolo.config import ServingConfig
from damoyolo.model.damoyolo import DamoYolo, build_model
from damoyolo.model.variants import VARIANTS

CLASS_NAMES = ("one", "two", "three")


@pytest.fixture(scope="session")
def network() -> DamoYolo:
    """Variant T, folded, with random weights."""
    torch.manual_seed(5)
    return build_model(VARIANTS["T"], len(CLASS_NAMES), folded=True).requires_grad_(False)


@pytest.fixture(scope="session")
def onnx_dir(network: DamoYolo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like an unpacked archive, with the ONNX form of the network."""
    folder = tmp_path_factory.mktemp("archive")
    export_onnx(network, folder / ONNX_FILE, class_names=CLASS_NAMES)
    return folder


@pytest.fixture(scope="session")
def open_network(network: DamoYolo) -> Callable[..., Backend]:
    """Opens a backend on a copy of the network; settings as keywords."""

    def open_it(model_dir: Path | None = None, device: str = "cpu", **settings: object) -> Backend:
        config = ServingConfig.from_mapping({"variant": "T", "class_names": list(CLASS_NAMES), **settings})
        return open_backend(copy.deepcopy(network), config, torch.device(device), model_dir)

    return open_it
