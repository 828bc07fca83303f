"""What lies beside a TensorRT engine: read back as written, and every mismatch refused with the way out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from damoyolo.backends.onnx_metadata import OnnxMetadata, metadata_of
from damoyolo.backends.tensorrt_metadata import (
    BatchRange,
    EngineMetadata,
    Machine,
    read_metadata,
    require_contiguous,
)
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo, build_model
from damoyolo.model.variants import VARIANTS

HERE = Machine("11.4.0.106", "NVIDIA A", "9.0")
NAMES = ("Zelle", "Plättchen")


@pytest.fixture(scope="module")
def model() -> DamoYolo:
    return build_model(VARIANTS["Ns"], 2, folded=True)


def described(facts: OnnxMetadata) -> EngineMetadata:
    return EngineMetadata(
        machine=HERE,
        network=dataclasses.replace(facts, precision="fp16"),
        min_size_hw=(320, 320),
        max_size_hw=(640, 960),
        batch_ranges=(BatchRange(1, 1), BatchRange(2, 8)),
        onnx_sha256="ab" * 32,
        plan_sha256=hashlib.sha256(b"plan").hexdigest(),
    )


@pytest.fixture
def metadata(model: DamoYolo) -> EngineMetadata:
    return described(metadata_of(model, NAMES))


def test_what_was_written_is_read_back(metadata: EngineMetadata, tmp_path: Path) -> None:
    path = tmp_path / "damoyolo.plan.json"
    path.write_text(metadata.to_json(), encoding="utf-8")
    assert read_metadata(path) == metadata


@pytest.mark.parametrize(
    "change",
    [
        {"format": "damoyolo-tensorrt-0"},
        {"machine": {"gpu_name": "x"}},
        {"network": {}},
        {"min_size_hw": [320]},
        {"batch_ranges": [[2, 8]]},
        {"unknown": 1},
    ],
)
def test_a_description_of_another_form_is_refused(
    metadata: EngineMetadata, tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "damoyolo.plan.json"
    path.write_text(json.dumps({**json.loads(metadata.to_json()), **change}))
    with pytest.raises(ConfigError, match=r"build_tensorrt|batch ranges|export_onnx"):
        read_metadata(path)


def test_a_missing_or_unreadable_description_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    for name in ("none.json", "list.json"):
        with pytest.raises(ConfigError, match=rf"{name} does not describe .*build_tensorrt"):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (
            HERE._replace(tensorrt_version="10.16.1.11"),
            r"tensorrt version 11\.4\.0\.106, here it is 10\.16\.1\.11",
        ),
        (HERE._replace(gpu_name="NVIDIA B"), "gpu name NVIDIA A, here it is NVIDIA B"),
        (HERE._replace(compute_capability="8.9"), r"compute capability 9\.0, here it is 8\.9"),
    ],
)
def test_another_machine_is_refused_with_both_and_the_command(
    metadata: EngineMetadata, here: Machine, said: str
) -> None:
    metadata.require_machine(HERE)
    with pytest.raises(ConfigError, match=rf"{said}.*build_tensorrt\.py --onnx.*{'ab' * 32}"):
        metadata.require_machine(here)


def test_an_exchanged_plan_is_refused(metadata: EngineMetadata) -> None:
    metadata.require_plan(b"plan")
    with pytest.raises(ConfigError, match="damaged or was exchanged"):
        metadata.require_plan(b"plam")


@pytest.mark.parametrize(
    ("settings", "size_hw", "said"),
    [
        ({}, (640, 992), "heights 320 to 640 and widths 320 to 960"),
        ({}, (288, 640), r"\[288, 640\]"),
        ({"class_names": ("a", "b")}, (640, 640), "class_names"),
        ({"precision": "bf16"}, (640, 640), "engine is fp16; set precision to auto"),
    ],
)
def test_settings_of_another_network_are_refused(
    model: DamoYolo,
    metadata: EngineMetadata,
    settings: dict[str, object],
    size_hw: tuple[int, int],
    said: str,
) -> None:
    good = {"variant": "Ns", "class_names": NAMES}
    for precision in ("auto", "fp16"):
        metadata.require_network(model, ServingConfig(**good, precision=precision), (640, 640))
    with pytest.raises(ConfigError, match=said):
        metadata.require_network(model, ServingConfig(**{**good, **settings}), size_hw)


def test_an_engine_of_other_weights_is_refused(model: DamoYolo) -> None:
    foreign = described(dataclasses.replace(metadata_of(model, NAMES), weights_digest="0" * 64))
    with pytest.raises(ConfigError, match="weights_digest 0000"):
        foreign.require_network(model, ServingConfig(variant="Ns", class_names=NAMES), (640, 640))


@pytest.mark.parametrize("ranges", [[], [(2, 8)], [(1, 1), (3, 8)], [(1, 4), (4, 8)], [(1, 0)]])
def test_ranges_that_leave_a_batch_size_out_are_refused(ranges: list[tuple[int, int]]) -> None:
    require_contiguous([BatchRange(1, 1), BatchRange(2, 8)])
    with pytest.raises(ConfigError, match="without a gap"):
        require_contiguous([BatchRange(*each) for each in ranges])
