"""Building an engine on a stand-in for TensorRT: what goes into the plan, and what is refused."""

import dataclasses
import hashlib
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from lib.cli import ScriptError
from lib.onnx.sensitivity import open_session
from lib.tensorrt.builder import build_engine, read_network, to_float16

from damoyolo.backends.onnx_metadata import INPUT_NAME, OUTPUT_NAMES, OnnxMetadata, as_predictions
from damoyolo.boxes import decode_predictions
from damoyolo.errors import ConfigError
from doubles import fake_tensorrt as fake_tensorrt

METADATA = OnnxMetadata("Ns", 2, ("one", "two"), 7, "fp32", "0" * 64)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    fake_tensorrt.install(monkeypatch)


@pytest.fixture
def path(tmp_path):
    return fake_tensorrt.write_onnx(tmp_path / "network.onnx", METADATA)


def build(path, precision=None, size_hw=(640, 960), batch_sizes=(1, 8)):
    gpu = fake_tensorrt.Gpu(torch.device("cpu"))
    return build_engine(read_network(path, precision), gpu, size_hw, batch_sizes)


def test_the_plan_has_profiles_without_a_gap_and_no_tf32_in_float32(path):
    plan, metadata = build(path)
    content = json.loads(plan)
    assert content["profiles"] == [
        {"images": [[1, 3, 640, 960], [1, 3, 640, 960], [1, 3, 640, 960]]},
        {"images": [[2, 3, 640, 960], [8, 3, 640, 960], [8, 3, 640, 960]]},
    ]
    assert content["tf32"] is False
    assert content["weight_types"] == [TensorProto.FLOAT]
    assert metadata.machine == ("11.4.0.106", "Stand-in GPU", "9.0")
    assert metadata.network == METADATA
    assert metadata.plan_sha256 == hashlib.sha256(plan).hexdigest()
    assert metadata.onnx_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_float16_engine_has_float16_weights_and_names_the_file_it_came_from(path):
    plan, metadata = build(path, "fp16")
    assert json.loads(plan)["weight_types"] == [TensorProto.FLOAT16]
    assert metadata.network == dataclasses.replace(METADATA, precision="fp16")
    assert metadata.onnx_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_int8_file_stays_int8_and_cannot_be_made_from_float32(path):
    with pytest.raises(ScriptError, match="needs a quantised file"):
        read_network(path, "int8")
    fake_tensorrt.write_onnx(path, dataclasses.replace(METADATA, precision="int8"))
    plan, metadata = build(path)
    assert metadata.network.precision == "int8"
    assert json.loads(plan)["tf32"] is True
    with pytest.raises(ScriptError, match="of precision int8, requested is fp16"):
        read_network(path, "fp16")


def test_the_network_in_float16_takes_uint8_gives_float32_and_nearly_the_same_answers(
    demo_onnx, demo_model, smear_pixels
):
    half = to_float16(onnx.load(demo_onnx))
    onnx.checker.check_model(half, full_check=True)
    scales = {node.input[2] for node in half.graph.node if node.op_type == "Resize"}
    floats = {each.name for each in half.graph.initializer if each.data_type == TensorProto.FLOAT}
    assert floats <= scales  # which ONNX wants in float32
    (cast,) = [node for node in half.graph.node if INPUT_NAME in node.input]
    assert cast.op_type == "Cast"  # the only operator of which TensorRT takes uint8

    outputs = open_session(half).run(list(OUTPUT_NAMES), {INPUT_NAME: smear_pixels})
    assert {each.dtype for each in outputs} == {np.dtype(np.float32)}
    found = decode_predictions(as_predictions([torch.from_numpy(each) for each in outputs]))
    with torch.inference_mode():
        expected = decode_predictions(demo_model(torch.from_numpy(smear_pixels).float()))
    seen = expected[0].amax(dim=-1) > 0.25
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0.02)  # the tolerances of fp16
    torch.testing.assert_close(found[1][seen], expected[1][seen], rtol=0, atol=2.0)
    assert not torch.equal(found[0], expected[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("parse", r"no importer for this operator \(node node_odd, Odd\)"),
        ("add_optimization_profile", "its own log lines above say why"),
        ("build_serialized_network", "its own log lines above say why"),
    ],
)
def test_a_build_that_fails_says_so(path, call, message):
    fake_tensorrt.failing.add(call)
    with pytest.raises(ScriptError, match=message):
        build(path)


def test_sizes_that_make_no_profile_are_refused(path):
    with pytest.raises(ScriptError, match=r"input size is \[640, 970\]; accepted are multiples of 32"):
        build(path, size_hw=(640, 970))
    for batch_sizes in ((8, 1), (1, 1)):
        with pytest.raises(ScriptError, match="accepted are ascending ones"):
            build(path, batch_sizes=batch_sizes)


def test_other_files_and_other_outputs_are_refused(path):
    fake_tensorrt.write_onnx(path, dataclasses.replace(METADATA, form="detections"))
    with pytest.raises(ScriptError, match=r"outputs 'detections'; accepted .*export_onnx\.py --outputs raw"):
        read_network(path)
    path.write_bytes(b"\x00\x01 garbage")
    with pytest.raises(ConfigError, match="is no ONNX file"):
        read_network(path)
