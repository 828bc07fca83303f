"""The backends that can run the network, each a file of its own behind one small interface."""

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
# What only PyTorch computes in on a CPU.
PYTORCH_PRECISIONS = ("amp",)


class Backend(Protocol):
    """A network made ready on one device, in one precision.

    name: what `backend` in the settings calls it.
    precision: a concrete one, never "auto"; "int8" where the network was quantised, whatever runs the rest.
    """

    name: str
    device: torch.device
    precision: str

    def __call__(self, pixels: Tensor) -> RawPredictions:
        """Predict for a batch.

        pixels: (B, 3, H, W) uint8 RGB on the device; H and W multiples of 32.

        Returns predictions on the device, in any floating-point type, that later calls leave alone.
        """
        ...


def open_backend(
    model: DamoYolo, config: ServingConfig, device: torch.device, model_dir: Path | None = None
) -> Backend:
    """The backend that `config.backend` names, made ready on a device.

    On a CPU it runs in as many threads as PyTorch does (`torch.get_num_threads`). The modules of the backends
    are imported here, so that a library is needed only by those who chose it.

    model: folded, on the CPU, in float32; taken over and changed.
    model_dir: folder of the unpacked archive, which may hold the network in further forms (ONNX_FILE).

    Raises:
        ConfigError: the backend's library is missing, it cannot run on the device or in the precision, or
            what the archive holds for it does not fit the settings.
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
    """What "auto" stands for: the fastest backend that is there and computes in the precision asked for.

    On a CPU that is OpenVINO (README, "Backends"), elsewhere PyTorch.
    """
    if device.type != "cpu" or config.precision in PYTORCH_PRECISIONS:
        return "pytorch"
    if importlib.util.find_spec("openvino") is None:
        logger.warning(
            "the network runs in PyTorch, slower than need be: openvino is not installed "
            "(pip install openvino, or set backend to pytorch)"
        )
        return "pytorch"
    return "openvino"


def missing_library(library: str, backend: str, error: ImportError) -> ConfigError:
    """What to raise where the library of a backend cannot be imported; names the way out."""
    return ConfigError(
        f"backend is {backend!r}, but {library} cannot be imported ({error}); pip install {library}, or set "
        "backend to auto"
    )
