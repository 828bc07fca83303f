"""From an ONNX file to an archive with a TensorRT engine, on a stand-in; only engines that pass are kept."""

import copy
import dataclasses
import json
import sys
import zipfile

import pytest
import torch
import yaml

from lib.archive.reader import load_detector
from lib.packaging.class_names import DEMO_CLASS_NAMES

import build_tensorrt
from damoyolo.backends.onnx_metadata import metadata_of
from damoyolo.backends.pytorch import PyTorchBackend
from damoyolo.errors import ConfigError
from doubles import fake_tensorrt as fake_tensorrt
from doubles.wrong_backends import WRONG_BACKENDS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine(demo_model):
    """What the stand-in's engines run."""
    return PyTorchBackend(copy.deepcopy(demo_model), CPU, "fp32")


@pytest.fixture(scope="module")
def onnx_file(demo_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "demo.onnx"
    return fake_tensorrt.write_onnx(path, metadata_of(demo_model, DEMO_CLASS_NAMES))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, engine):
    fake_tensorrt.install(monkeypatch, engine)


def command(onnx_file, store, *options):
    fixed = ["--device", "cpu", "--profiles", "1", "3", "--input-size", "320", "320"]
    return ["--onnx", str(onnx_file), "--output-dir", str(store), *fixed, *options]


def test_a_right_engine_gets_an_archive_that_detects_as_pytorch_does(onnx_file, tmp_path, smears, capsys):
    report = tmp_path / "report.json"
    assert build_tensorrt.main(command(onnx_file, tmp_path / "store", "--json", str(report))) == 0
    out = capsys.readouterr().out
    assert "AP not compared" in out
    assert [each["batch_size"] for each in json.loads(report.read_text())["parities"]] == [1, 2, 3]
    (archive,) = (tmp_path / "store").iterdir()
    with zipfile.ZipFile(archive) as opened:
        assert {"damoyolo.plan", "damoyolo.plan.json", "damoyolo.pth"} <= set(opened.namelist())
        settings = yaml.safe_load(opened.read("model-config.yaml"))["handler"]
    assert (settings["backend"], settings["input_size_hw"]) == ("tensorrt", [320, 320])

    found = {}
    for backend in ("tensorrt", "pytorch"):
        detector = load_detector(archive, CPU, backend=backend, precision="fp32")
        assert detector.pipeline.name == backend
        found[backend] = detector.detect(smears * 2, [detector.config.default_options()] * 2 * len(smears))
        detector.close()
    for mine, wanted in zip(found["tensorrt"], found["pytorch"], strict=True):
        assert mine.class_ids.tolist() == wanted.class_ids.tolist() != []
        assert mine.boxes_xyxy == pytest.approx(wanted.boxes_xyxy, abs=0.05)


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("name", ["a rare class lost", "levels swapped", "wrong in batches alone"])
def test_a_silently_wrong_engine_leaves_no_archive_and_an_old_one_untouched(
    onnx_file, tmp_path, engine, monkeypatch, capsys, name
):
    store = tmp_path / "store"
    store.mkdir()
    (store / "damoyolo.mar").write_bytes(b"old")

    monkeypatch.setattr(fake_tensorrt, "network", lambda pixels: WRONG_BACKENDS[name](engine(pixels)))
    assert build_tensorrt.main(command(onnx_file, store)) == 1
    assert "differs from PyTorch" in capsys.readouterr().err
    assert [path.name for path in store.iterdir()] == ["damoyolo.mar"]
    assert (store / "damoyolo.mar").read_bytes() == b"old"


@pytest.mark.usefixtures("unverified")
def test_a_float16_archive_says_so_and_is_refused_in_another_precision_or_on_another_machine(
    onnx_file, tmp_path, monkeypatch
):
    archive = tmp_path / "store" / "damoyolo.mar"
    assert build_tensorrt.main(command(onnx_file, archive.parent, "--precision", "fp16")) == 0
    detector = load_detector(archive, CPU)
    assert detector.pipeline.precision == "fp16"
    detector.close()
    with pytest.raises(ConfigError, match="the TensorRT engine is fp16"):
        load_detector(archive, CPU, precision="bf16")
    monkeypatch.setattr(fake_tensorrt, "__version__", "11.3.0.99")
    with pytest.raises(ConfigError, match=r"tensorrt version 11\.4\.0\.106, here it is 11\.3\.0\.99"):
        load_detector(archive, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_digest": "0" * 64}, "was not made from"),
        ({"precision": "int8"}, "give a data set to compare AP on"),
    ],
)
def test_other_weights_and_int8_without_a_data_set_are_refused_before_anything_is_built(
    tmp_path, demo_model, capsys, change, message
):
    metadata = dataclasses.replace(metadata_of(demo_model, DEMO_CLASS_NAMES), **change)
    path = fake_tensorrt.write_onnx(tmp_path / "x.onnx", metadata)
    assert build_tensorrt.main(command(path, tmp_path / "store")) == 1
    assert message in capsys.readouterr().err
    assert fake_tensorrt.calls == []


def test_without_tensorrt_the_command_says_what_to_install(onnx_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert build_tensorrt.main(command(onnx_file, tmp_path / "store")) == 1
    assert "pip install tensorrt-cu13" in capsys.readouterr().err
    assert list((tmp_path / "store").iterdir()) == []
