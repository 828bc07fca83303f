"""Run the network in OpenVINO on a CPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from damoyolo.backends import missing_library
from damoyolo.backends.onnx_metadata import (
    INPUT_NAME,
    OUTPUT_NAMES,
    OnnxMetadata,
    RawOutputs,
    as_predictions,
    check_compatible,
)
from damoyolo.backends.openvino_import import import_openvino, openvino_core
from damoyolo.backends.precision import resolve_backend_precision, warn_of_inexact_int8
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.model.pixel_stem import join_focus
from damoyolo.structures import RawPredictions

PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}
# With at most so many, a batch goes through the network image by image: then every shape is known when the
# network is compiled, which fuses more (S in INT8: 5 to 9 % less time at batch 1), and larger calls were no
# faster (docs/backends.md). More threads than this were not measured: they take a batch in one call.
FEW_THREADS = 4


class OpenVINOBackend:
    """The archive's ONNX file in OpenVINO; without one, the PyTorch network, converted at start-up.

    Call with (B, 3, H, W) uint8 RGB on the CPU; returns float32. Another size than that of the settings, and
    with more than FEW_THREADS threads batches of several images, are compiled at their first call: a worker
    of batch size 1 needs one network only.

    Raises:
        ConfigError: the library is missing, the device is not a CPU, OpenVINO does not have the precision, or
            the file is of another network.
    """

    name = "openvino"

    def __init__(
        self, model: DamoYolo, config: ServingConfig, device: torch.device, onnx_file: Path | None = None
    ) -> None:
        if device.type != "cpu":
            raise ConfigError(f"backend {self.name} runs on a CPU, not on {device}; set backend to auto")
        try:
            openvino = import_openvino()
        except ImportError as error:
            raise missing_library("openvino", self.name, error) from error
        float_precision = resolve_backend_precision(config.precision, self.name)
        self.device = device
        if onnx_file is None:
            self.precision = float_precision
            network = _convert(openvino, model)
        else:
            network = _read(onnx_file)
            metadata = OnnxMetadata.from_metadata(_metadata(network), onnx_file)
            check_compatible(metadata, onnx_file, config, model)
            self.precision = "int8" if metadata.precision == "int8" else float_precision
            if self.precision == "int8":
                warn_of_inexact_int8(self.name)
        self.properties = {
            "INFERENCE_PRECISION_HINT": PRECISION_HINTS[float_precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # One batch at a time, all threads on it.
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # Workers do not know of one another and would all pin their threads to the first cores.
            "ENABLE_CPU_PINNING": False,
        }
        self.network = network
        self.takes_batches = torch.get_num_threads() > FEW_THREADS
        self.batch_request: Any = None
        self.size_hw = config.input_size_hw or model.variant.input_size_hw
        self.request = self._compile(1, *self.size_hw)

    def _compile(self, batch_size: int, height: int, width: int) -> Any:
        """A request for one shape of the pixels; -1 is a side of any length."""
        self.network.reshape({INPUT_NAME: [batch_size, 3, height, width]})
        return openvino_core().compile_model(self.network, "CPU", self.properties).create_infer_request()

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> RawPredictions:
        # Twice as fast as Tensor.contiguous() for images that are channels last in memory.
        images = np.ascontiguousarray(pixels.numpy())
        if self.takes_batches and len(images) > 1:
            self.batch_request = self.batch_request or self._compile(-1, -1, -1)
            return _infer(self.batch_request, images)
        if images.shape[2:] != self.size_hw:
            self.size_hw = images.shape[2], images.shape[3]
            self.request = self._compile(1, *self.size_hw)
        found = [_infer(self.request, images[index : index + 1]) for index in range(len(images))]
        return found[0] if len(found) == 1 else RawPredictions.joined(found)


def _infer(request: Any, images: NDArray[np.uint8]) -> RawPredictions:
    # infer() returns copies: OpenVINO overwrites its own memory at the next call.
    found = request.infer({INPUT_NAME: images}, share_inputs=True)
    return as_predictions([torch.from_numpy(found[name]) for name in OUTPUT_NAMES])


def _convert(openvino: Any, model: DamoYolo) -> Any:
    """The network as an OpenVINO model that takes any batch and image size."""
    with warnings.catch_warnings():
        # It traces the network, which PyTorch deprecates; torch.export takes several times as long.
        warnings.simplefilter("ignore")
        network = openvino.convert_model(
            RawOutputs(join_focus(model)).eval(),
            example_input=torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
            input=[([-1, 3, -1, -1], openvino.Type.u8)],
        )
    network.input(0).get_tensor().set_names({INPUT_NAME})
    for output, name in zip(network.outputs, OUTPUT_NAMES, strict=True):
        output.get_tensor().set_names({name})
    return network


def _read(onnx_file: Path) -> Any:
    try:
        return openvino_core().read_model(onnx_file)
    except RuntimeError as error:
        raise ConfigError(
            f"{onnx_file.name} cannot be read by openvino: {error}; rebuild the archive"
        ) from error


def _metadata(network: Any) -> dict[str, str]:
    """The `metadata_props` of the ONNX file that a model was read from."""
    if not network.has_rt_info("framework"):
        return {}
    return {key: value.astype(str) for key, value in network.get_rt_info("framework").astype(dict).items()}
