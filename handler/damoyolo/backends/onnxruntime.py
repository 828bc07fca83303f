"""Run the network in ONNX Runtime, on a CPU or, where onnxruntime-gpu is installed, on CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from damoyolo.backends import ONNX_FILE, missing_library
from damoyolo.backends.onnx_metadata import (
    CLASS_OUTPUTS,
    INPUT_NAME,
    OUTPUT_NAMES,
    OnnxMetadata,
    as_predictions,
    check_compatible,
)
from damoyolo.backends.precision import resolve_backend_precision, warn_of_inexact_int8
from damoyolo.boxes import STRIDES
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.structures import RawPredictions

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ERRORS_ONLY = 3  # a log level of ONNX Runtime


class OnnxRuntimeBackend:
    """The archive's ONNX file in ONNX Runtime: in float32, or in int8 if it is quantised.

    Call with (B, 3, H, W) uint8 RGB on the device; returns float32.

    Raises:
        ConfigError: the library, its support for the device or the file is missing, the file is of another
            network, or another precision is requested.
    """

    name = "onnxruntime"

    def __init__(
        self, model: DamoYolo, config: ServingConfig, device: torch.device, onnx_file: Path | None
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_library("onnxruntime", self.name, error) from error
        if onnx_file is None:
            raise ConfigError(
                f"backend is {self.name!r}, but the archive holds no {ONNX_FILE}; build it with "
                "--backend onnxruntime, or set backend to auto"
            )
        resolve_backend_precision(config.precision, self.name)
        provider = PROVIDERS[device.type]
        if provider not in onnxruntime.get_available_providers():
            raise ConfigError(
                f"backend is {self.name!r} on {device}, but the installed onnxruntime lacks {provider}; "
                "pip install onnxruntime-gpu in place of onnxruntime, or set backend to auto"
            )
        self.device = device
        self.num_classes = model.num_classes
        self.bin_channels = 4 * (model.variant.reg_max + 1)
        self.session = self._open_session(onnxruntime, onnx_file, provider)
        metadata = OnnxMetadata.from_metadata(self.session.get_modelmeta().custom_metadata_map, onnx_file)
        check_compatible(metadata, onnx_file, config, model)
        self.precision = metadata.precision
        if self.precision == "int8" and device.type == "cpu":
            warn_of_inexact_int8(self.name)

    def _open_session(self, onnxruntime: Any, onnx_file: Path, provider: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Spinning threads take cores from those that decode images and compute boxes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        index = self.device.index or 0
        # By default it computes in TF32 on CUDA, which is less precise than fp32.
        on_cuda = {"device_id": str(index), "use_tf32": "0"}
        provider_options = on_cuda if self.device.type == "cuda" else {}
        try:
            session = onnxruntime.InferenceSession(
                onnx_file, options, providers=[(provider, provider_options)]
            )
        except Exception as error:  # each error code has a class of its own, directly below Exception
            raise ConfigError(
                f"{onnx_file.name} cannot be opened by onnxruntime: {error}; rebuild the archive"
            ) from error
        # Where CUDA's libraries do not load, it falls back to the CPU silently.
        if session.get_providers()[0] != provider:
            raise ConfigError(
                f"backend is {self.name!r} on {self.device}, but onnxruntime could not start {provider}; "
                "install the CUDA and cuDNN versions that it needs, or set backend to auto"
            )
        return session

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> RawPredictions:
        pixels = pixels.contiguous()
        batch_size, _, height, width = pixels.shape
        outputs = [
            torch.empty(
                batch_size,
                self.num_classes if name in CLASS_OUTPUTS else self.bin_channels,
                height // stride,
                width // stride,
                device=self.device,
            )
            for name, stride in zip(OUTPUT_NAMES, STRIDES * 2, strict=True)
        ]
        # Bound by address, so that on CUDA nothing passes through the host.
        binding = self.session.io_binding()
        on_device = self.device.type, self.device.index or 0
        binding.bind_input(INPUT_NAME, *on_device, np.uint8, tuple(pixels.shape), pixels.data_ptr())
        for name, output in zip(OUTPUT_NAMES, outputs, strict=True):
            binding.bind_output(name, *on_device, np.float32, tuple(output.shape), output.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # it runs on a stream of its own
        self.session.run_with_iobinding(binding)
        return as_predictions(outputs)
