"""Building an engine on a stand-in for TensorRT: what goes into the plan, and which files are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lib.tensorrt.builder import EngineBuildError, EngineRequest, build_engine, read_onnx

from damoyolo.backends.onnx_metadata import OnnxMetadata
from damoyolo.backends.tensorrt_metadata import BatchRange
from damoyolo.errors import ConfigError
from doubles import fake_tensorrt as fake_tensorrt
from doubles.tensorrt_material import install_stand_in, write_onnx

FACTS = OnnxMetadata("Ns", 2, ("one", "two"), 7, "fp32", "0" * 64)
GPU = fake_tensorrt.Gpu(torch.device("cpu"))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch)


def request(path: Path, **changes: Any) -> EngineRequest:
    plain = EngineRequest(
        read_onnx(path),
        batch_ranges=(BatchRange(1, 1), BatchRange(2, 8)),
        input_size_hw=(640, 640),
        min_size_hw=(320, 320),
        max_size_hw=(640, 960),
    )
    return dataclasses.replace(plain, **changes)


def test_the_plan_has_a_profile_a_range_and_no_tf32_in_float32(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "network.onnx", FACTS)
    plan, metadata = build_engine(request(path, workspace_mib=512), GPU)
    content = json.loads(plan)
    assert content["profiles"] == [
        {"images": [[1, 3, 320, 320], [1, 3, 640, 640], [1, 3, 640, 960]]},
        {"images": [[2, 3, 320, 320], [8, 3, 640, 640], [8, 3, 640, 960]]},
    ]
    assert content["tf32"] is False
    assert content["workspace"] == 512 * 1024 * 1024
    assert metadata.machine == ("11.4.0.106", "Stand-in GPU", "9.0")
    assert metadata.network == FACTS
    assert metadata.plan_sha256 == hashlib.sha256(plan).hexdigest()
    assert metadata.onnx_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_tensorrt_cannot_read_is_refused_with_the_node(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "network.onnx", FACTS)
    fake_tensorrt.failing.add("parse_from_file")
    with pytest.raises(EngineBuildError, match=r"no importer for this operator \(node node_odd, Odd\)"):
        build_engine(request(path), GPU)


@pytest.mark.parametrize("call", ["build_serialized_network", "add_optimization_profile"])
def test_a_build_that_fails_says_so(tmp_path: Path, call: str) -> None:
    path = write_onnx(tmp_path / "network.onnx", FACTS)
    fake_tensorrt.failing.add(call)
    with pytest.raises(EngineBuildError, match="in its own lines above"):
        build_engine(request(path), GPU)


def test_the_timing_cache_is_made_used_again_and_a_foreign_one_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "new" / "timing.bin"
    wanted = request(write_onnx(tmp_path / "network.onnx", FACTS), timing_cache=cache)
    build_engine(wanted, GPU)
    assert cache.read_bytes() == b"+measured"
    build_engine(wanted, GPU)
    assert cache.read_bytes() == b"+measured+measured"
    assert capsys.readouterr().out == ""
    cache.write_bytes(b"foreign")
    build_engine(wanted, GPU)
    assert cache.read_bytes() == b"+measured"
    assert "starting it anew" in capsys.readouterr().out


def test_a_failed_build_leaves_the_timing_cache_alone(tmp_path: Path) -> None:
    cache = tmp_path / "timing.bin"
    cache.write_bytes(b"old")
    fake_tensorrt.failing.add("build_serialized_network")
    with pytest.raises(EngineBuildError):
        build_engine(request(write_onnx(tmp_path / "network.onnx", FACTS), timing_cache=cache), GPU)
    assert cache.read_bytes() == b"old"


def test_sizes_and_ranges_that_make_no_profile_are_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "network.onnx", FACTS)
    for change in ({"min_size_hw": (672, 320)}, {"max_size_hw": (640, 970)}):
        with pytest.raises(EngineBuildError, match="ascending multiples of 32"):
            request(path, **change)
    with pytest.raises(ConfigError, match="without a gap"):
        request(path, batch_ranges=(BatchRange(2, 8),))


def test_a_file_that_is_not_of_this_project_is_refused(tmp_path: Path) -> None:
    garbage, bare = tmp_path / "garbage.onnx", tmp_path / "bare.onnx"
    garbage.write_bytes(b"\x00\x01 garbage")
    model = onnx.load(write_onnx(bare, FACTS))
    del model.metadata_props[:]
    onnx.save(model, bare)
    for path in (garbage, bare, tmp_path / "none.onnx"):
        with pytest.raises(EngineBuildError, match=r"no ONNX file of this project.*export_onnx"):
            read_onnx(path)


def test_pixels_that_are_not_cast_at_once_are_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "network.onnx", FACTS, cast_to=TensorProto.INT32)
    with pytest.raises(EngineBuildError, match="Cast to float32 or float16"):
        read_onnx(path)
    model = onnx.load(write_onnx(path, FACTS))
    model.graph.node.append(helper.make_node("Identity", ["images"], ["more"], name="more"))
    onnx.save(model, path)
    with pytest.raises(EngineBuildError, match="Identity reads the uint8 pixels"):
        read_onnx(path)


def test_other_inputs_outputs_and_precisions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    write_onnx(path, dataclasses.replace(FACTS, precision="bf16"))
    with pytest.raises(EngineBuildError, match="'bf16'; accepted are fp32, fp16, int8"):
        read_onnx(path)
    model = onnx.load(write_onnx(path, FACTS))
    model.graph.output.pop()
    onnx.save(model, path)
    with pytest.raises(EngineBuildError, match=r"without NMS: .*--form raw"):
        read_onnx(path)


def quantised(path: Path, zero_point: np.ndarray[Any, Any] | None) -> Path:
    """The file with its cast pixels quantised and back; says int8."""
    model = onnx.load(write_onnx(path, dataclasses.replace(FACTS, precision="int8")))
    extra = [] if zero_point is None else ["zero"]
    if zero_point is not None:
        model.graph.initializer.append(numpy_helper.from_array(zero_point, "zero"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(2.0, np.float32), "scale"))
    for node in model.graph.node:
        node.input[:] = ["back" if name == "pixels" else name for name in node.input]
    quantise = helper.make_node("QuantizeLinear", ["pixels", "scale", *extra], ["grey"], name="q")
    restore = helper.make_node("DequantizeLinear", ["grey", "scale", *extra], ["back"], name="dq")
    model.graph.node.insert(1, quantise)
    model.graph.node.insert(2, restore)
    onnx.save(model, path)
    return path


def test_symmetric_int8_is_taken_and_may_use_tf32_beside(tmp_path: Path) -> None:
    path = quantised(tmp_path / "network.onnx", np.array(0, np.int8))
    plan, metadata = build_engine(request(path), GPU)
    assert metadata.network.precision == "int8"
    assert json.loads(plan)["tf32"] is True


@pytest.mark.parametrize(
    ("zero_point", "said"),
    [
        (np.array(0, np.uint8), "of type UINT8; TensorRT takes INT8 only"),
        (np.array(3, np.int8), "is not 0; TensorRT takes symmetric"),
        (None, "of type none"),
    ],
)
def test_other_quantisation_is_refused(
    tmp_path: Path, zero_point: np.ndarray[Any, Any] | None, said: str
) -> None:
    with pytest.raises(EngineBuildError, match=said):
        read_onnx(quantised(tmp_path / "network.onnx", zero_point))


def test_a_file_that_only_says_int8_is_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "network.onnx", dataclasses.replace(FACTS, precision="int8"))
    with pytest.raises(EngineBuildError, match="no QuantizeLinear"):
        read_onnx(path)
