"""The table of engines, on a small network and small pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import benchmark_backends
from benchmark_backends import COLUMNS, REFERENCE, cpu_engines, measure_engines
from damoyolo.backends import ONNX_FILE
from damoyolo.config import ServingConfig
from damoyolo.detector import Detector
from damoyolo.model.damoyolo import DamoYolo, build_model
from damoyolo.model.variants import VARIANTS
from export_onnx import export_onnx
from in_process import read_pictures
from measuring import format_table

CLASS_NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def network() -> DamoYolo:
    torch.manual_seed(2)
    return build_model(VARIANTS["Ns"], len(CLASS_NAMES), folded=True).requires_grad_(False)


@pytest.fixture(scope="module")
def detector(network: DamoYolo) -> Iterator[Detector]:
    config = ServingConfig(
        variant="Ns", class_names=CLASS_NAMES, input_size_hw=(64, 96), backend="pytorch", precision="fp32"
    )
    detector = Detector(network, config, torch.device("cpu"))
    yield detector
    detector.close()


def test_every_engine_stands_beside_plain_float32(
    network: DamoYolo, detector: Detector, project_dir: Path, tmp_path: Path
) -> None:
    export_onnx(network, tmp_path / ONNX_FILE, class_names=CLASS_NAMES)
    engines = cpu_engines(network, CLASS_NAMES, tmp_path, compile_too=False)
    pictures = read_pictures(project_dir / "tests/data/smears")
    own = detector.engine
    rows = measure_engines(engines, detector, pictures, [1, 2], rounds=1)
    assert detector.engine is own
    assert len(rows) == 2 * len(engines)
    by_name = {row["engine"]: row for row in rows if row["batch_size"] == 2}
    assert by_name[REFERENCE]["score_difference"] == 0
    assert 0 < by_name["openvino fp32"]["score_difference"] < 1e-4
    assert 0 < by_name["onnxruntime fp32"]["score_difference"] < 1e-4
    assert 1e-6 < by_name["pytorch bf16"]["score_difference"] < 0.2
    for row in rows:
        assert row["network_ms"] > 0
        assert row["detector_pictures_per_s"] == pytest.approx(row["batch_size"] / row["detector_ms"] * 1e3)
        assert row["library"].split()[0] in ("torch", "onnxruntime", "openvino")
    json.dumps(rows, allow_nan=False)
    assert "openvino bf16" in format_table(rows, COLUMNS)


def test_a_quantised_file_is_measured_beside_float32(network: DamoYolo, tmp_path: Path) -> None:
    names = [
        each.name for each in cpu_engines(network, CLASS_NAMES, tmp_path, compile_too=True, quantised=True)
    ]
    assert names[0] == REFERENCE
    assert all("int8" in name for name in names[1:])


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_backends.main(["--pictures", str(tmp_path)]) == 1
    assert "no *.jpg" in capsys.readouterr().err
