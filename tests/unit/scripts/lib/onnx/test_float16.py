"""A float16 file: every weight in it, pixels and predictions as before, and nearly the same answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lib.onnx.export import export_onnx
from lib.onnx.float16 import HalfError, to_half
from lib.tensorrt.builder import read_onnx

from damoyolo.backends.onnx_metadata import OUTPUT_NAMES, OnnxMetadata, as_predictions
from damoyolo.boxes import decode_predictions
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS
from doubles.tensorrt_material import write_onnx

FACTS = OnnxMetadata("Ns", 2, ("one", "two"), 7, "fp32", "0" * 64)


def test_the_network_in_float16_says_nearly_what_it_says_in_float32(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(2)
    model = build_model(VARIANTS["Ns"], 3, folded=True).requires_grad_(False)
    export_onnx(model, tmp_path / "full.onnx")
    half = to_half(onnx.load(tmp_path / "full.onnx"))
    onnx.save(half, tmp_path / "half.onnx")
    kept = {node.input[2] for node in half.graph.node if node.op_type == "Resize"}
    floats = {each.name for each in half.graph.initializer if each.data_type == TensorProto.FLOAT}
    assert floats == kept
    assert read_onnx(tmp_path / "half.onnx").facts.precision == "fp16"

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(tmp_path / "half.onnx", providers=["CPUExecutionProvider"])
    pixels = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    outputs = [torch.from_numpy(each) for each in session.run(OUTPUT_NAMES, {"images": pixels.numpy()})]
    assert {each.dtype for each in outputs} == {torch.float32}
    found, expected = decode_predictions(as_predictions(outputs)), decode_predictions(model(pixels.float()))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0.5)
    assert not torch.equal(found[0], expected[0])


def test_the_file_given_is_left_as_it_is(tmp_path: Path) -> None:
    model = onnx.load(write_onnx(tmp_path / "network.onnx", FACTS))
    before = model.SerializeToString()
    to_half(model)
    assert model.SerializeToString() == before


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = onnx.load(write_onnx(tmp_path / "network.onnx", FACTS))
    weight = model.graph.initializer[0]
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = 70_000
    weight.CopyFrom(numpy_helper.from_array(values.astype(np.float32), weight.name))
    with pytest.raises(HalfError, match=f"{weight.name} holds values beyond float16"):
        to_half(model)


def test_a_network_that_casts_inside_is_refused(tmp_path: Path) -> None:
    model = onnx.load(write_onnx(tmp_path / "network.onnx", FACTS))
    model.graph.node.append(
        helper.make_node("Cast", ["pixels"], ["again"], name="inner", to=TensorProto.FLOAT)
    )
    with pytest.raises(HalfError, match="inner casts to float32"):
        to_half(model)
