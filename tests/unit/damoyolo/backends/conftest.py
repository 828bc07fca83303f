"""A small network and the files of it that the backends open."""

import copy

import pytest
import torch

from lib.onnx.export import export_onnx

from damoyolo.backends import ONNX_FILE, open_backend
from damoyolo.config import ServingConfig
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS

CLASS_NAMES = ("one", "two", "three")


@pytest.fixture(scope="session")
def network():
    """Variant T, folded, with random weights."""
    torch.manual_seed(5)
    return build_model(VARIANTS["T"], len(CLASS_NAMES), folded=True).requires_grad_(False)


@pytest.fixture(scope="session")
def onnx_dir(network, tmp_path_factory):
    """A folder like an unpacked archive, with the ONNX form of the network."""
    folder = tmp_path_factory.mktemp("archive")
    export_onnx(network, folder / ONNX_FILE, class_names=CLASS_NAMES)
    return folder


@pytest.fixture(scope="session")
def open_network(network):
    """Opens a backend on a copy of the network; settings as keywords."""

    def open_it(model_dir=None, device="cpu", **settings):
        config = ServingConfig.from_mapping({"variant": "T", "class_names": list(CLASS_NAMES), **settings})
        return open_backend(copy.deepcopy(network), config, torch.device(device), model_dir)

    return open_it
