"""A stand-in for the module `tensorrt`, strict about names, argument types and the order of calls.

Its engine runs a PyTorch network on the CPU, reads and writes memory by address as the real one does, and
is described by the plan alone. `test_the_stand_in_has_nothing_that_the_real_module_lacks` compares it with
the real module where that is installed. Names and signatures are those of TensorRT 10.16.1 and 11.4.0.
"""

import contextlib
import ctypes
import enum
import json
import math
import sys
from collections import UserList

import numpy as np
import onnx
import onnx.parser
import torch
from onnx import helper, numpy_helper

from damoyolo.backends import tensorrt as tensorrt_backend
from damoyolo.backends.onnx_metadata import OUTPUT_NAMES
from damoyolo.boxes import STRIDES

__version__ = "11.4.0.106"

# What a test may set: the network that engines run, and the calls that fail.
network = None
failing = set()
calls = []


def install(monkeypatch, engine_network=None):
    """Let `import tensorrt` give this module, as if new, and let the CPU pass for a GPU."""
    global network
    network = engine_network
    failing.clear()
    calls.clear()
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules[__name__])
    monkeypatch.setattr(tensorrt_backend, "Gpu", Gpu)


def _call(name):
    """Record a call; whether it succeeds."""
    calls.append(name)
    return name not in failing


def _require_type(value, *types):
    if type(value) not in types:
        raise TypeError("incompatible function arguments")


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 0  # it is 1 in 10.16


class BuilderFlag(enum.Enum):
    TF32 = 7


class Logger:
    WARNING = 2

    def __init__(self, min_severity):
        pass


class Dims(UserList):
    """Sizes; a sequence, but no tuple."""


class IOptimizationProfile:
    def set_shape(self, input, min, opt, max):
        self._shapes = {input: (min, opt, max)}


class INetworkDefinition:
    def __init__(self, flags=0):
        self._strongly_typed = bool(flags & (1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED))


class ParserError:
    desc = staticmethod(lambda: "no importer for this operator")
    node = staticmethod(lambda: 7)
    node_name = staticmethod(lambda: "node_odd")
    node_operator = staticmethod(lambda: "Odd")


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self._network = network

    def get_error(self, index):
        return ParserError()

    def parse(self, model):
        _require_type(model, bytes)
        self._network._content = model
        self.num_errors = int("parse" in failing)
        return _call("parse")


class IBuilderConfig:
    def __init__(self):
        self._flags = {BuilderFlag.TF32}
        self._profiles = []

    def clear_flag(self, flag):
        self._flags.discard(flag)

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return len(self._profiles) - 1 if _call("add_optimization_profile") else -1


class Builder:
    create_network = INetworkDefinition
    create_builder_config = IBuilderConfig
    create_optimization_profile = IOptimizationProfile

    def __init__(self, logger):
        _require_type(logger, Logger)

    def build_serialized_network(self, network, config):
        """A plan that describes the engine, as a buffer and not as bytes."""
        if not _call("build_serialized_network"):
            return None
        assert network._strongly_typed, "TensorRT 10 would choose types by itself"
        graph = onnx.load_model_from_string(network._content).graph
        content = {
            "input": graph.input[0].name,
            "channels": {each.name: each.type.tensor_type.shape.dim[1].dim_value for each in graph.output},
            "profiles": [profile._shapes for profile in config._profiles],
            "tf32": BuilderFlag.TF32 in config._flags,
            "weight_types": sorted({each.data_type for each in graph.initializer}),
        }
        return memoryview(json.dumps(content).encode())


class Runtime:
    def __init__(self, logger):
        _require_type(logger, Logger)

    def deserialize_cuda_engine(self, serialized_engine):
        return ICudaEngine(json.loads(serialized_engine)) if _call("deserialize_cuda_engine") else None


class ICudaEngine:
    def __init__(self, content):
        self._content = content

    def create_execution_context(self):
        return IExecutionContext(self._content) if _call("create_execution_context") else None


class IExecutionContext:
    def __init__(self, content):
        self._content = content
        self._profile = 0
        self._shape = None
        self._addresses = {}

    @property
    def active_optimization_profile(self):
        return self._profile

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self._profile = profile_index
        self._shape = None  # as the real one does
        return _call("set_optimization_profile_async")

    def set_input_shape(self, name, shape):
        _require_type(shape, tuple, list, Dims)
        low, _, high = self._content["profiles"][self._profile][name]
        if not all(a <= side <= b for a, side, b in zip(low, shape, high, strict=True)):
            return False
        self._shape = shape
        return _call("set_input_shape")

    def get_tensor_shape(self, name):
        """Of an output; sizes follow from the input, and are -1 where that is not set."""
        count, _, height, width = self._shape or (-1,) * 4
        stride = int(name.rpartition("_")[2])
        return Dims((count, self._content["channels"][name], height // stride, width // stride))

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return _call("set_tensor_address")

    def execute_async_v3(self, stream_handle):
        if not _call("execute_async_v3"):
            return False
        assert stream_handle != 0, "the default stream makes TensorRT synchronise the device"
        # An engine sees plain rows at an address, whatever strides the tensor had.
        raw = network(_memory(self._addresses[self._content["input"]], self._shape, torch.uint8).clone())
        outputs = (*raw.class_logits, *raw.distance_logits)
        for name, values in zip(self._content["channels"], outputs, strict=True):
            shape = tuple(self.get_tensor_shape(name))
            _memory(self._addresses[name], shape, torch.float32).copy_(values.reshape(shape))
        return True


def _memory(address, shape, dtype):
    buffer = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).reshape(tuple(shape))


class Gpu:
    """In place of `damoyolo.backends.tensorrt.Gpu`: the CPU, under another name."""

    name = "Stand-in GPU"
    compute_capability = "9.0"

    def __init__(self, device):
        self.selected = contextlib.nullcontext

    @contextlib.contextmanager
    def stream(self):
        calls.append("stream begins")
        yield 7
        calls.append("stream ends")


def public_names():
    """Each class of this stand-in, and each of its public attributes after a dot."""
    for name, value in list(globals().items()):
        if isinstance(value, type) and value.__module__ == __name__ and value is not Gpu:
            yield name
            members = value.__members__ if issubclass(value, enum.Enum) else vars(value)
            yield from (f"{name}.{attribute}" for attribute in members if not attribute.startswith("_"))


def write_onnx(path, metadata):
    """A file with the inputs, outputs and metadata of the network, but one convolution for each output."""
    channels = [metadata.num_classes] * 3 + [4 * (metadata.reg_max + 1)] * 3
    outputs, nodes, weights = [], ["pixels = Cast <to = 1> (images)"], []
    for name, count, stride in zip(OUTPUT_NAMES, channels, STRIDES * 2, strict=True):
        outputs.append(f"float[batch, {count}, height_{stride}, width_{stride}] {name}")
        nodes.append(f"{name} = Conv <strides = [{stride}, {stride}]> (pixels, {name}_weight)")
        values = np.zeros((count, 3, stride, stride), np.float32)
        weights.append(numpy_helper.from_array(values, f"{name}_weight"))
    signature = f"(uint8[batch, 3, height, width] images) => ({', '.join(outputs)})"
    graph = onnx.parser.parse_graph(f"network {signature} {{ {' '.join(nodes)} }}")
    graph.initializer.extend(weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata.to_metadata())
    onnx.save(model, path)
    return path
