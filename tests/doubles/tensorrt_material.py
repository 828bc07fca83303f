"""What the tests of TensorRT share: a small ONNX file of the project's form, and the stand-in."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from damoyolo.backends import tensorrt as tensorrt_backend
from damoyolo.backends.onnx_metadata import INPUT_NAME, OUTPUT_NAMES, OnnxMetadata
from doubles import fake_tensorrt as fake_tensorrt


def install_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import tensorrt` give the stand-in, and let the CPU pass for a GPU."""
    fake_tensorrt.reset()
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setattr(tensorrt_backend, "Gpu", fake_tensorrt.Gpu)


def write_onnx(path: Path, facts: OnnxMetadata, cast_to: int = TensorProto.FLOAT) -> Path:
    """A file with the inputs, outputs and metadata of the network, but one convolution for each output."""
    generator = np.random.default_rng(1)
    channels = [facts.num_classes] * 3 + [4 * (facts.reg_max + 1)] * 3
    nodes = [helper.make_node("Cast", [INPUT_NAME], ["pixels"], name="cast", to=cast_to)]
    constants = []
    for name, count in zip(OUTPUT_NAMES, channels, strict=True):
        stride = int(name.rpartition("_")[2])
        weights = (generator.standard_normal((count, 3, stride, stride)) / 50 / stride).astype(np.float32)
        constants.append(numpy_helper.from_array(weights, f"{name}.weight"))
        nodes.append(
            helper.make_node(
                "Conv", ["pixels", f"{name}.weight"], [name], name=f"{name}.conv", strides=[stride, stride]
            )
        )
    images = helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, ["batch", 3, "height", "width"])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", count, None, None])
        for name, count in zip(OUTPUT_NAMES, channels, strict=True)
    ]
    graph = helper.make_graph(nodes, "network", [images], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, facts.to_metadata())
    onnx.save(model, path)
    return path
