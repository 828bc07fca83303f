"""A stand-in for the module `tensorrt`, strict about names, argument types and the order of calls.

Its engine runs a PyTorch network on the CPU, reads and writes memory by address as the real one does, and
is described by the plan alone. `test_the_stand_in_has_nothing_that_the_real_module_lacks` compares it with
the real module where that is installed. Names and signatures are those of TensorRT 10.16.1 and 11.4.0.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from damoyolo.backends import tensorrt as tensorrt_backend
from damoyolo.backends.onnx_metadata import INPUT_NAME, OUTPUT_NAMES, OnnxMetadata
from damoyolo.structures import RawPredictions

__version__ = "11.4.0.106"

Network = Callable[[Tensor], RawPredictions]

# What a test may set: the network that engines run, and the calls that fail.
network: Network | None = None
failing: set[str] = set()
calls: list[str] = []


def install(monkeypatch: pytest.MonkeyPatch, engine_network: Network | None = None) -> None:
    """Let `import tensorrt` give this module, as if new, and let the CPU pass for a GPU."""
    global network
    network = engine_network
    failing.clear()
    calls.clear()
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules[__name__])
    monkeypatch.setattr(tensorrt_backend, "Gpu", Gpu)


def _call(name: str) -> bool:
    """Record a call; whether it succeeds."""
    calls.append(name)
    return name not in failing


class DataType(enum.Enum):
    FLOAT = 0
    UINT8 = 5


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 0  # it is 1 in 10.16


class BuilderFlag(enum.Enum):
    TF32 = 7


class Logger:
    WARNING = 2

    def __init__(self, min_severity: int = WARNING) -> None:
        self.min_severity = min_severity


class IHostMemory:
    """A buffer, as in the real module through the buffer protocol, which Python 3.10 lacks for classes."""

    def __new__(cls, content: bytes) -> Any:
        return memoryview(content)


class Dims:
    """Sizes; a sequence, but no tuple."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, index: int) -> int:
        return self._shape[index]


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        self._shapes[input] = (tuple(min), tuple(opt), tuple(max))


class INetworkDefinition:
    def __init__(self, flags: int = 0) -> None:
        self._strongly_typed = bool(flags & (1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._content: bytes | None = None


class ParserError:
    def desc(self) -> str:
        return "no importer for this operator"

    def node(self) -> int:
        return 7

    def node_name(self) -> str:
        return "node_odd"

    def node_operator(self) -> str:
        return "Odd"


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: Logger) -> None:
        self._network = network
        self.num_errors = 0

    def get_error(self, index: int) -> ParserError:
        return ParserError()

    def parse(self, model: bytes) -> bool:
        if not isinstance(model, bytes):
            raise TypeError("incompatible function arguments")
        self._network._content = model
        done = _call("parse")
        self.num_errors = int(not done)
        return done


class IBuilderConfig:
    def __init__(self) -> None:
        self._flags = {BuilderFlag.TF32}
        self._profiles: list[IOptimizationProfile] = []

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if not _call("add_optimization_profile"):
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1


class Builder:
    create_network = INetworkDefinition
    create_builder_config = IBuilderConfig
    create_optimization_profile = IOptimizationProfile

    def __init__(self, logger: Logger) -> None:
        if not isinstance(logger, Logger):
            raise TypeError("incompatible function arguments")

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        """A plan that describes the engine."""
        if not _call("build_serialized_network"):
            return None
        assert network._content is not None, "nothing was parsed"
        assert network._strongly_typed, "TensorRT 10 would choose types by itself"
        model = onnx.load_model_from_string(network._content)
        sides = {
            each.name: [dim.dim_value or -1 for dim in each.type.tensor_type.shape.dim]
            for each in (*model.graph.input, *model.graph.output)
        }
        content = {
            "shapes": sides,
            "inputs": [each.name for each in model.graph.input],
            "profiles": [profile._shapes for profile in config._profiles],
            "tf32": BuilderFlag.TF32 in config._flags,
            "weight_types": sorted({each.data_type for each in model.graph.initializer}),
        }
        return IHostMemory(json.dumps(content).encode())


class Runtime:
    def __init__(self, logger: Logger) -> None:
        if not isinstance(logger, Logger):
            raise TypeError("incompatible function arguments")

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        return ICudaEngine(json.loads(serialized_engine)) if _call("deserialize_cuda_engine") else None


class ICudaEngine:
    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content
        self._names = list(content["shapes"])

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._content["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.UINT8 if name in self._content["inputs"] else DataType.FLOAT

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._content["shapes"][name])

    def create_execution_context(self) -> IExecutionContext | None:
        return IExecutionContext(self) if _call("create_execution_context") else None


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return False
        self._profile = profile_index
        self._shapes.clear()  # as the real one does
        return _call("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if type(shape) not in (tuple, list, Dims):
            raise TypeError("incompatible function arguments")
        low, _, high = self._engine._content["profiles"][self._profile][name]
        if not all(a <= side <= b for a, side, b in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return _call("set_input_shape")

    def get_tensor_shape(self, name: str) -> Dims:
        """Sizes of an output follow from the input; -1 where that is not set."""
        if name in self._engine._content["inputs"] or not self._shapes:
            return Dims(self._shapes.get(name, self._engine._content["shapes"][name]))
        (images,) = self._shapes.values()
        stride = int(name.rpartition("_")[2])
        channels = self._engine._content["shapes"][name][1]
        return Dims((images[0], channels, images[2] // stride, images[3] // stride))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._names:
            return False
        self._addresses[name] = memory
        return _call("set_tensor_address")

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not _call("execute_async_v3"):
            return False
        assert stream_handle != 0, "the default stream makes TensorRT synchronise the device"
        assert network is not None, "the test set no network"
        (input_name,) = self._engine._content["inputs"]
        # An engine sees plain rows at an address, whatever strides the tensor had.
        pixels = _memory(self._addresses[input_name], self._shapes[input_name], torch.uint8).clone()
        names = [name for name in self._engine._names if name != input_name]
        raw = network(pixels)
        for name, values in zip(names, (*raw.class_logits, *raw.distance_logits), strict=True):
            shape = tuple(self.get_tensor_shape(name))
            _memory(self._addresses[name], shape, torch.float32).copy_(values.reshape(shape))
        return True


def _memory(address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    buffer = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).reshape(tuple(shape))


class Gpu:
    """In place of `damoyolo.backends.tensorrt.Gpu`: the CPU, under another name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = "Stand-in GPU"
        self.compute_capability = "9.0"

    def selected(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        calls.append("stream begins")
        yield 7
        calls.append("stream ends")


def public_names() -> Iterator[tuple[str, str | None]]:
    """Each class of this stand-in, alone and with each of its public attributes."""
    for name, value in list(globals().items()):
        if isinstance(value, type) and value.__module__ == __name__ and value is not Gpu:
            yield name, None
            members = value.__members__ if issubclass(value, enum.Enum) else vars(value)
            for attribute in members:
                if not attribute.startswith("_"):
                    yield name, attribute


def write_onnx(path: Path, metadata: OnnxMetadata) -> Path:
    """A file with the inputs, outputs and metadata of the network, but one convolution for each output."""
    generator = np.random.default_rng(1)
    channels = [metadata.num_classes] * 3 + [4 * (metadata.reg_max + 1)] * 3
    nodes = [helper.make_node("Cast", [INPUT_NAME], ["pixels"], name="cast", to=TensorProto.FLOAT)]
    weights, outputs = [], []
    for name, count in zip(OUTPUT_NAMES, channels, strict=True):
        stride = int(name.rpartition("_")[2])
        values = (generator.standard_normal((count, 3, stride, stride)) / 50 / stride).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"{name}.weight"))
        inputs = ["pixels", f"{name}.weight"]
        nodes.append(helper.make_node("Conv", inputs, [name], name=f"{name}.conv", strides=[stride, stride]))
        shape = ["batch", count, None, None]
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    images = helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, ["batch", 3, "height", "width"])
    graph = helper.make_graph(nodes, "network", [images], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata.to_metadata())
    onnx.save(model, path)
    return path
