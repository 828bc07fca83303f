"""The network as a TensorRT engine (10.x or 11.x): checked before it is loaded, run on torch's memory.

Not run on TensorRT: written against its documented interface and tested with a stand-in for it (README).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from damoyolo.backends.onnx_metadata import (
    CLASS_OUTPUTS,
    DISTANCE_OUTPUTS,
    INPUT_NAME,
    OUTPUT_NAMES,
    as_predictions,
)
from damoyolo.backends.tensorrt_metadata import (
    ENGINE_FILE,
    METADATA_FILE,
    REBUILD_COMMAND,
    EngineMetadata,
    Machine,
    read_metadata,
)
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.structures import RawPredictions

# By the names of tensorrt.DataType. Of pixels TensorRT takes uint8; what it computes in is in the engine.
DTYPES = {"UINT8": torch.uint8, "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}


def import_tensorrt() -> ModuleType:
    """The module `tensorrt`.

    Raises:
        ConfigError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"backend is tensorrt, but TensorRT cannot be imported ({type(error).__name__}: {error}); "
            "install it with `pip install tensorrt-cu13` (tensorrt-cu12 for CUDA 12) in the version that the "
            "engine was built with, or set backend to another"
        ) from error


class Gpu:
    """What TensorRT needs of a CUDA device beside memory: its name, to be selected, and a stream."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(
                f"backend is tensorrt and the device is {device}; TensorRT runs on cuda[:index] only: give "
                "the worker a GPU, or set backend to another"
            )
        self.device = device
        self.name = torch.cuda.get_device_name(device)
        self.compute_capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def selected(self) -> AbstractContextManager[Any]:
        """Make this the device that TensorRT works on."""
        return torch.cuda.device(self.device)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Handle of a stream that starts after the current one and that the current one waits for.

        On the default stream, which is the current one in a worker, TensorRT synchronises the whole device.
        """
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            yield self._stream.cuda_stream
        finally:
            current.wait_stream(self._stream)


class TensorRTBackend:
    """A TensorRT engine on one GPU: grey levels in, raw predictions out.

    Call with (B, 3, H, W) uint8 RGB on the device; returns RawPredictions in the dtype of the engine's
    outputs. Not for several threads at once.
    """

    name = "tensorrt"

    def __init__(self, plan: bytes, metadata: EngineMetadata, device: torch.device) -> None:
        """Load an engine.

        plan: the engine. It holds machine code that loading can run: take it from a trusted source only.

        Raises:
            ConfigError: TensorRT or the GPU is missing, or the engine belongs to other ones.
        """
        trt = import_tensorrt()
        self.device = device
        self.precision = metadata.network.precision
        self.metadata = metadata
        self._gpu = Gpu(device)
        # Before loading: what TensorRT says of a foreign engine names neither machine.
        metadata.require_plan(plan)
        metadata.require_machine(machine_of(self._gpu, trt))
        # Each must outlive what it made.
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        with self._gpu.selected():
            self._engine = _made(self._runtime.deserialize_cuda_engine(plan), "load the engine")
            self._output_dtypes = self._require_interface(trt)
            # One for all profiles: a context each would hold the memory of the largest profile each.
            self._context = _made(self._engine.create_execution_context(), "make an execution context")

    @classmethod
    def from_archive_dir(
        cls, model_dir: Path | None, model: DamoYolo, config: ServingConfig, device: torch.device
    ) -> TensorRTBackend:
        """The engine of an unpacked archive.

        model: the network of the archive, folded, on the CPU, in float32.

        Raises:
            ConfigError: there is none, or it does not belong to this archive or machine.
        """
        if model_dir is None or not (model_dir / ENGINE_FILE).is_file():
            raise ConfigError(
                f"backend is tensorrt, but the archive has no {ENGINE_FILE}; {REBUILD_COMMAND} builds one "
                "with it, or set backend to another"
            )
        metadata = read_metadata(model_dir / METADATA_FILE)
        metadata.require_network(model, config, config.input_size_hw or model.variant.input_size_hw)
        return cls((model_dir / ENGINE_FILE).read_bytes(), metadata, device)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> RawPredictions:
        """Predict for a batch; one beyond the largest profile is cut up.

        Raises:
            ConfigError: no profile covers the height and width.
            RuntimeError: TensorRT refused.
        """
        largest = self.metadata.batch_ranges[-1].largest
        if len(pixels) > largest:
            return RawPredictions.joined([self(part) for part in torch.split(pixels, largest)])
        self.metadata.require_size((pixels.shape[2], pixels.shape[3]))
        # Images come with the channels innermost; an engine reads plain rows from an address.
        pixels = pixels.contiguous()
        with self._gpu.selected(), self._gpu.stream() as stream:
            outputs = self._enqueue(pixels, stream)
        return as_predictions([outputs[name] for name in OUTPUT_NAMES])

    def _enqueue(self, pixels: Tensor, stream: int) -> dict[str, Tensor]:
        context = self._context
        profile = self._profile_of(len(pixels))
        if context.active_optimization_profile != profile:
            # On the stream of the execution, which orders the two. Forgets the input shape.
            _require(context.set_optimization_profile_async(profile, stream), f"take profile {profile}")
        shape = tuple(pixels.shape)
        _require(context.set_input_shape(INPUT_NAME, shape), f"take an input of {shape}")
        outputs = {
            name: torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self.device)
            for name, dtype in self._output_dtypes.items()
        }
        for name, tensor in {INPUT_NAME: pixels, **outputs}.items():
            _require(context.set_tensor_address(name, tensor.data_ptr()), f"take the memory of {name}")
        _require(context.execute_async_v3(stream), f"run a batch of {len(pixels)}")
        return outputs

    def _profile_of(self, batch_size: int) -> int:
        ranges = self.metadata.batch_ranges
        return next(index for index, each in enumerate(ranges) if batch_size <= each.largest)

    def _require_interface(self, trt: ModuleType) -> dict[str, torch.dtype]:
        """The dtype of each output, once the engine has the inputs and outputs that it has to have."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        dtypes = {name: DTYPES.get(engine.get_tensor_dtype(name).name) for name in names}
        inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        channels = dict.fromkeys(CLASS_OUTPUTS, self.metadata.network.num_classes)
        channels |= dict.fromkeys(DISTANCE_OUTPUTS, 4 * (self.metadata.network.reg_max + 1))
        fits = (
            inputs == {INPUT_NAME}
            and dtypes[INPUT_NAME] == torch.uint8
            and set(names) - inputs == set(channels)
            and all(dtypes[name] not in (None, torch.uint8) for name in channels)
            and all(engine.get_tensor_shape(name)[1] == count for name, count in channels.items())
            and engine.num_optimization_profiles == len(self.metadata.batch_ranges)
        )
        if not fits:
            found = ", ".join(
                f"{name} {engine.get_tensor_dtype(name).name} {list(engine.get_tensor_shape(name))}"
                for name in names
            )
            wanted = ", ".join(f"{name} of {count} channels" for name, count in channels.items())
            raise ConfigError(
                f"the TensorRT engine has {found} and {engine.num_optimization_profiles} profiles; accepted "
                f"is {INPUT_NAME} UINT8, outputs {wanted} "
                f"and {len(self.metadata.batch_ranges)} profiles. Build it anew: {REBUILD_COMMAND}"
            )
        return {name: dtype for name in channels if (dtype := dtypes[name]) is not None}


def machine_of(gpu: Gpu, trt: ModuleType) -> Machine:
    """What an engine built here, now, is bound to."""
    return Machine(str(trt.__version__), gpu.name, gpu.compute_capability)


def _made(value: Any, what: str) -> Any:
    """TensorRT answers None where it failed."""
    if value is None:
        raise ConfigError(
            f"TensorRT could not {what}; it says why in its own lines above. Build it anew: {REBUILD_COMMAND}"
        )
    return value


def _require(done: bool, what: str) -> None:
    """TensorRT answers False where it failed."""
    if not done:
        raise RuntimeError(f"TensorRT could not {what}; it says why in its own lines above")
