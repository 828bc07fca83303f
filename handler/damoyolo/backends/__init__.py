"""Choose and open the backend that runs the network; each backend is a module with the same interface."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.structures import RawPredictions

logger = logging.getLogger(__name__)

ONNX_FILE = "damoyolo.onnx"
# On a CPU only PyTorch has these.
PYTORCH_PRECISIONS = ("amp",)


class Backend(Protocol):
    """A network ready to run on one device, in one precision.

    name: what `backend` in the settings calls it.
    precision: never "auto"; "int8" where the network was quantised, whatever the rest of it runs in.
    """

    name: str
    device: torch.device
    precision: str

    def __call__(self, pixels: Tensor) -> RawPredictions:
        """Predict for a batch.

        pixels: (B, 3, H, W) uint8 RGB on the device; H and W multiples of 32.

        Returns predictions on the device, in any floating-point type; later calls do not overwrite them.
        """
        ...


def open_backend(
    model: DamoYolo, config: ServingConfig, device: torch.device, model_dir: Path | None = None
) -> Backend:
    """Open the backend that `config.backend` names on a device.

    On a CPU it runs in as many threads as PyTorch (`torch.get_num_threads`). The modules are imported here,
    so that a library has to be installed only where it is used.

    model: folded, on the CPU, in float32; the backend takes it over and may change it.
    model_dir: folder of the unpacked archive, which may also hold the network in another format (ONNX_FILE).

    Raises:
        ConfigError: the backend's library is missing, the backend cannot run on the device or in the
            precision, or its file in the archive does not match the settings.
    """
    onnx_file = None
    if model_dir is not None and (model_dir / ONNX_FILE).is_file():
        onnx_file = model_dir / ONNX_FILE
    name = choose_backend(config, device) if config.backend == "auto" else config.backend
    if name == "pytorch":
        from damoyolo.backends.pytorch import PyTorchBackend

        return PyTorchBackend(model, device, config.precision)
    if name == "openvino":
        from damoyolo.backends.openvino import OpenVINOBackend

        return OpenVINOBackend(model, config, device, onnx_file)
    if name == "onnxruntime":
        from damoyolo.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(model, config, device, onnx_file)
    from damoyolo.backends.tensorrt import TensorRTBackend

    return TensorRTBackend.from_archive_dir(model_dir, model, config, device)


def choose_backend(config: ServingConfig, device: torch.device) -> str:
    """What "auto" stands for: the fastest installed backend that has the requested precision.

    On a CPU that is OpenVINO (docs/backends.md), elsewhere PyTorch.
    """
    if device.type != "cpu" or config.precision in PYTORCH_PRECISIONS:
        return "pytorch"
    if importlib.util.find_spec("openvino") is None:
        logger.warning(
            "the network runs in PyTorch, which is slower: openvino is not installed "
            "(pip install openvino, or set backend to pytorch)"
        )
        return "pytorch"
    return "openvino"


def missing_library(library: str, backend: str, error: ImportError) -> ConfigError:
    """The error for a backend whose library cannot be imported."""
    return ConfigError(
        f"backend is {backend!r}, but {library} cannot be imported ({error}); pip install {library}, or set "
        "backend to auto"
    )
