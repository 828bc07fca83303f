"""From an ONNX file to an archive with an engine, on a stand-in for TensorRT; without proof there is none."""

from __future__ import annotations

import dataclasses
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from lib.archive.reader import load_detector
from lib.packaging.class_names import DEMO_CLASS_NAMES
from lib.packaging.weights import folded_network
from lib.paths import DEMO_WEIGHTS

import build_archive
import build_tensorrt
from damoyolo.backends.onnx_metadata import metadata_of
from damoyolo.backends.pytorch import PyTorchBackend
from damoyolo.backends.tensorrt_metadata import BatchRange
from damoyolo.errors import ConfigError
from damoyolo.structures import Detections, RawPredictions
from doubles import fake_tensorrt as fake_tensorrt
from doubles.tensorrt_material import install_stand_in, write_onnx
from doubles.wrong_backends import WRONG_BACKENDS, Wrong

CPU = torch.device("cpu")
SIZE = ["--input-size", "320", "320"]


@pytest.fixture(scope="module")
def engine() -> PyTorchBackend:
    """The demo network, which the stand-in's engines run."""
    return PyTorchBackend(folded_network(DEMO_WEIGHTS, None, len(DEMO_CLASS_NAMES)), CPU, "fp32")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = folded_network(DEMO_WEIGHTS, None, len(DEMO_CLASS_NAMES))
    return write_onnx(tmp_path_factory.mktemp("onnx") / "demo.onnx", metadata_of(model, DEMO_CLASS_NAMES))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, engine: PyTorchBackend) -> None:
    install_stand_in(monkeypatch)
    monkeypatch.setattr(build_tensorrt, "Gpu", fake_tensorrt.Gpu)
    engine_says(engine, lambda raw: raw)


def engine_says(engine: PyTorchBackend, change: Wrong) -> None:
    def network(pixels: Tensor) -> list[Tensor]:
        raw: RawPredictions = change(engine(pixels))
        return [*raw.class_logits, *raw.distance_logits]

    fake_tensorrt.network = network


def command(onnx_file: Path, store: Path, *options: str) -> list[str]:
    return [
        *("--onnx", str(onnx_file), "--output-dir", str(store), "--device", "cpu", "--no-timing-cache"),
        *("--batch-ranges", "1", "2-3", *SIZE, *options),
    ]


def test_a_right_engine_gets_an_archive_that_detects_as_pytorch_does(
    onnx_file: Path, tmp_path: Path, project_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert build_tensorrt.main(command(onnx_file, tmp_path / "store", "--report", str(report))) == 0
    out = capsys.readouterr().out
    assert "AP not compared" in out
    assert [each["batch_size"] for each in json.loads(report.read_text())["parities"]] == [1, 2, 3]
    (archive,) = (tmp_path / "store").iterdir()
    with zipfile.ZipFile(archive) as opened:
        assert {"damoyolo.plan", "damoyolo.plan.json", "damoyolo.pth"} <= set(opened.namelist())
        settings = yaml.safe_load(opened.read("model-config.yaml"))["handler"]
    assert (settings["backend"], settings["input_size_hw"]) == ("tensorrt", [320, 320])

    images = [path.read_bytes() for path in sorted((project_dir / "tests/data/smears").glob("*.jpg"))] * 2
    found = {}
    for backend in ("tensorrt", "pytorch"):
        detector = load_detector(archive, CPU, backend=backend, precision="fp32")
        assert detector.pipeline.name == backend
        found[backend] = detector.detect(images, [detector.config.default_options()] * len(images))
        detector.close()
    for mine, wanted in zip(found["tensorrt"], found["pytorch"], strict=True):
        assert isinstance(mine, Detections)
        assert isinstance(wanted, Detections)
        assert mine.class_ids.tolist() == wanted.class_ids.tolist() != []
        assert mine.boxes_xyxy == pytest.approx(wanted.boxes_xyxy, abs=0.05)


@pytest.mark.parametrize("name", ["a rare class lost", "levels swapped", "wrong in batches alone"])
def test_a_silently_wrong_engine_leaves_no_archive_and_an_old_one_untouched(
    onnx_file: Path,
    tmp_path: Path,
    engine: PyTorchBackend,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.setattr(build_archive, "verify_archive", lambda _: [])  # passed by the test above
    store = tmp_path / "store"
    store.mkdir()
    (store / "damoyolo.mar").write_bytes(b"old")

    engine_says(engine, WRONG_BACKENDS[name])
    assert build_tensorrt.main(command(onnx_file, store)) == 1
    assert "build_tensorrt: the engine differs from PyTorch" in capsys.readouterr().err
    assert [path.name for path in store.iterdir()] == ["damoyolo.mar"]
    assert (store / "damoyolo.mar").read_bytes() == b"old"


def test_float16_is_built_from_a_float16_copy(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_archive, "verify_archive", lambda _: [])
    assert build_tensorrt.main(command(onnx_file, tmp_path / "store", "--precision", "fp16")) == 0
    with zipfile.ZipFile(tmp_path / "store" / "damoyolo.mar") as opened:
        plan = json.loads(opened.read("damoyolo.plan"))
        described = json.loads(opened.read("damoyolo.plan.json"))
    assert plan["weight_types"] == [10]  # onnx.TensorProto.FLOAT16
    assert described["network"]["precision"] == "fp16"
    # Of the file that is there to build from again, not of the copy.
    assert described["onnx_sha256"] == build_tensorrt.read_onnx(onnx_file).sha256
    detector = load_detector(tmp_path / "store" / "damoyolo.mar", CPU)
    assert detector.pipeline.precision == "fp16"
    detector.close()
    with pytest.raises(ConfigError, match="the TensorRT engine is fp16"):
        load_detector(tmp_path / "store" / "damoyolo.mar", CPU, precision="bf16")


def test_the_archive_is_refused_on_another_gpu(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_archive, "verify_archive", lambda _: [])
    assert build_tensorrt.main(command(onnx_file, tmp_path / "store")) == 0
    monkeypatch.setattr(fake_tensorrt, "__version__", "11.3.0.99")
    with pytest.raises(ConfigError, match=r"tensorrt version 11\.4\.0\.106, here it is 11\.3\.0\.99"):
        load_detector(tmp_path / "store" / "damoyolo.mar", CPU)


def test_a_file_of_other_weights_is_refused_before_anything_is_built(
    tmp_path: Path, engine: PyTorchBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = dataclasses.replace(
        build_tensorrt.read_onnx(
            write_onnx(tmp_path / "x.onnx", metadata_of(engine.model, DEMO_CLASS_NAMES))
        ).facts,
        weights_digest="0" * 64,
    )
    path = write_onnx(tmp_path / "x.onnx", facts)
    assert build_tensorrt.main(command(path, tmp_path / "store")) == 1
    assert "was not made from" in capsys.readouterr().err
    assert fake_tensorrt.calls == []


def test_int8_cannot_be_asked_of_a_float32_file(
    onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = build_tensorrt.read_onnx(onnx_file)
    with pytest.raises(build_tensorrt.EngineBuildError, match="needs a quantised file"):
        build_tensorrt.in_precision(network, "int8", tmp_path)
    with pytest.raises(SystemExit):
        build_tensorrt.main(command(onnx_file, tmp_path, "--precision", "int8"))
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_batch_ranges_are_read() -> None:
    assert build_tensorrt.batch_range("4") == BatchRange(4, 4)
    assert build_tensorrt.batch_range("9-32") == BatchRange(9, 32)


def test_without_tensorrt_the_command_says_what_to_install(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert build_tensorrt.main(command(onnx_file, tmp_path / "store")) == 1
    assert "pip install tensorrt-cu13" in capsys.readouterr().err
    assert list((tmp_path / "store").iterdir()) == []
