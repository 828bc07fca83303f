"""Run the network as a TensorRT engine (10.x or 11.x), which is checked before it is loaded.

Never run on TensorRT: written against its documented interface and tested with a stand-in for it
(docs/tensorrt.md).
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from damoyolo.backends.onnx_metadata import (
    INPUT_NAME,
    OUTPUT_NAMES,
    OnnxMetadata,
    as_predictions,
    check_compatible,
)
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.structures import RawPredictions

ENGINE_FILE = "damoyolo.plan"
METADATA_FILE = "damoyolo.plan.json"
METADATA_FORMAT = "damoyolo-tensorrt-2"
REBUILD_COMMAND = "python scripts/build_tensorrt.py --onnx FILE"


class Machine(NamedTuple):
    """What an engine is bound to: it runs only on this GPU with this version of TensorRT."""

    tensorrt_version: str
    gpu_name: str
    compute_capability: str  # major.minor


@dataclass(frozen=True)
class EngineMetadata:
    """The JSON file beside an engine, which itself tells at most its TensorRT version.

    machine: where it was built. network: of the ONNX file; precision is fp32, fp16 or int8.
    input_size_hw: height and width of the network input, in pixels.
    batch_sizes: the largest of each optimisation profile, ascending.
    onnx_sha256, plan_sha256: digests of the ONNX file and of the engine, in hexadecimal.
    """

    machine: Machine
    network: OnnxMetadata
    input_size_hw: tuple[int, int]
    batch_sizes: tuple[int, ...]
    onnx_sha256: str
    plan_sha256: str

    def to_json(self) -> str:
        """The text that `read_metadata` reads."""
        content = {
            "format": METADATA_FORMAT,
            **dataclasses.asdict(self),
            "machine": self.machine._asdict(),
            "network": self.network.to_metadata(),
        }
        return json.dumps(content, indent=2, ensure_ascii=False)

    def require_plan(self, plan: bytes) -> None:
        """Refuse an engine other than the one described.

        Raises:
            ConfigError: with both digests.
        """
        found = hashlib.sha256(plan).hexdigest()
        if found != self.plan_sha256:
            raise ConfigError(
                f"{ENGINE_FILE} has SHA-256 {found}, {METADATA_FILE} says {self.plan_sha256}: it is damaged "
                f"or was replaced; build the engine again: {REBUILD_COMMAND}"
            )

    def require_machine(self, here: Machine) -> None:
        """Refuse any machine unlike the one that the engine was built on.

        Raises:
            ConfigError: with the differences.
        """
        differences = [
            f"{name.replace('_', ' ')} {built}, here it is {found}"
            for name, built, found in zip(Machine._fields, self.machine, here, strict=True)
            if built != found
        ]
        if differences:
            raise ConfigError(
                f"the TensorRT engine was built for {'; '.join(differences)}. Build it again on this "
                f"machine: {REBUILD_COMMAND} (from the ONNX file with SHA-256 {self.onnx_sha256}), or set "
                "backend to another"
            )

    def require_network(self, model: DamoYolo, config: ServingConfig, input_size_hw: tuple[int, int]) -> None:
        """Refuse an engine of another network (`check_compatible`), precision or input size.

        Raises:
            ConfigError: with the difference.
        """
        check_compatible(self.network, Path(ENGINE_FILE), config, model, ("fp32", "fp16", "int8"))
        if config.precision not in ("auto", self.network.precision):
            raise ConfigError(
                f"precision is {config.precision!r}, the TensorRT engine is {self.network.precision}; set "
                f"precision to auto, or build another engine (fp32, fp16; int8 from a quantised file): "
                f"{REBUILD_COMMAND}"
            )
        if input_size_hw != self.input_size_hw:
            raise ConfigError(
                f"the network input is {list(input_size_hw)} (height, width), the TensorRT engine takes "
                f"{list(self.input_size_hw)}; change input_size_hw, or build the engine for this size: "
                f"{REBUILD_COMMAND} --input-size HEIGHT WIDTH"
            )


def read_metadata(path: Path) -> EngineMetadata:
    """Read the JSON file beside an engine.

    Raises:
        ConfigError: the file is missing or has another form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (found := content.pop("format")) != METADATA_FORMAT:
            raise ValueError(f"format {found!r}, accepted is {METADATA_FORMAT!r}")
        height, width = content.pop("input_size_hw")
        return EngineMetadata(
            machine=Machine(**content.pop("machine")),
            network=OnnxMetadata.from_metadata(content.pop("network"), path),
            input_size_hw=(height, width),
            batch_sizes=tuple(content.pop("batch_sizes")),
            **content,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path.name} does not describe a TensorRT engine ({type(error).__name__}: {error}); build the "
            f"engine again: {REBUILD_COMMAND}"
        ) from error


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
    """A CUDA device with its own stream, for TensorRT."""

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
    """A TensorRT engine on one GPU.

    Call with (B, 3, H, W) uint8 RGB on the device; returns float32. Not for several threads at once.
    """

    name = "tensorrt"

    def __init__(self, plan: bytes, metadata: EngineMetadata, device: torch.device) -> None:
        """Load an engine.

        plan: the engine. It contains machine code that loading can run: take it only from a trusted source.

        Raises:
            ConfigError: TensorRT or the GPU is missing, or the engine belongs to others.
        """
        trt = import_tensorrt()
        self.device = device
        self.precision = metadata.network.precision
        self.metadata = metadata
        self._gpu = Gpu(device)
        # Before loading, because TensorRT's own message names neither machine.
        metadata.require_plan(plan)
        metadata.require_machine(machine_of(self._gpu, trt))
        # Each must outlive what it made.
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        with self._gpu.selected():
            self._engine = _done(
                self._runtime.deserialize_cuda_engine(plan),
                f"load the engine (build it again: {REBUILD_COMMAND})",
                ConfigError,
            )
            # One context for all profiles: each would reserve the memory of the largest profile.
            self._context = _done(
                self._engine.create_execution_context(), "make an execution context", ConfigError
            )

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
                f"backend is tensorrt, but the archive has no {ENGINE_FILE}; {REBUILD_COMMAND} builds an "
                "archive with one, or set backend to another"
            )
        metadata = read_metadata(model_dir / METADATA_FILE)
        metadata.require_network(model, config, config.input_size_hw or model.variant.input_size_hw)
        return cls((model_dir / ENGINE_FILE).read_bytes(), metadata, device)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> RawPredictions:
        """Predict for a batch; one larger than the largest profile is split.

        Raises:
            RuntimeError: a call of TensorRT failed, for instance because the height or width is another.
        """
        largest = self.metadata.batch_sizes[-1]
        if len(pixels) > largest:
            return RawPredictions.joined([self(part) for part in torch.split(pixels, largest)])
        # An engine reads contiguous rows from an address; batches come with channels last.
        pixels = pixels.contiguous()
        with self._gpu.selected(), self._gpu.stream() as stream:
            outputs = self._enqueue(pixels, stream)
        return as_predictions([outputs[name] for name in OUTPUT_NAMES])

    def _enqueue(self, pixels: Tensor, stream: int) -> dict[str, Tensor]:
        context = self._context
        profile = bisect.bisect_left(self.metadata.batch_sizes, len(pixels))
        if context.active_optimization_profile != profile:
            # On the same stream as the execution, which orders the two. Resets the input shape.
            _done(context.set_optimization_profile_async(profile, stream), f"take profile {profile}")
        shape = tuple(pixels.shape)
        _done(context.set_input_shape(INPUT_NAME, shape), f"take an input of {shape}")
        outputs = {
            name: torch.empty(tuple(context.get_tensor_shape(name)), dtype=torch.float32, device=self.device)
            for name in OUTPUT_NAMES
        }
        for name, tensor in {INPUT_NAME: pixels, **outputs}.items():
            _done(context.set_tensor_address(name, tensor.data_ptr()), f"take the memory of {name}")
        _done(context.execute_async_v3(stream), f"run a batch of {len(pixels)}")
        return outputs


def machine_of(gpu: Gpu, trt: ModuleType) -> Machine:
    """What an engine built here and now is bound to."""
    return Machine(str(trt.__version__), gpu.name, gpu.compute_capability)


def _done(result: Any, what: str, error: type[Exception] = RuntimeError) -> Any:
    """Refuse None and False, which TensorRT returns where it failed."""
    if result is None or result is False:
        raise error(f"TensorRT could not {what}; its own log lines above say why")
    return result
