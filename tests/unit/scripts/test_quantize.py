"""The command that quantises: from a folder of images to an INT8 file, its table and its plot."""

import json

import onnx
import pytest
from PIL import Image

from lib.onnx.export import read_onnx_metadata

import quantize
from doubles.fragile_network import ALL_BUT_ONE_STAGE


@pytest.fixture(autouse=True)
def loaded_network(monkeypatch, demo_model, demo_network):
    """Neither load nor export the demo network again."""
    monkeypatch.setattr(quantize, "load_network", lambda _: (demo_model, ()))
    monkeypatch.setattr("lib.onnx.export.to_onnx", lambda *_, **__: demo_network)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib and what it imports
def test_the_command_writes_file_report_and_plot(project_dir, tmp_path, capsys):
    output, report, plot = tmp_path / "new" / "int8.onnx", tmp_path / "a" / "b.json", tmp_path / "c" / "d.png"
    command = ["--calibration", str(project_dir / "tests/data/smears"), "--input-size", "256", "320"]
    command += ["--keep-float", ",".join(ALL_BUT_ONE_STAGE), "--max-loss", "0.5", "--no-progress"]
    command += ["--output", str(output), "--json", str(report), "--plot", str(plot)]
    assert quantize.main(command) == 0
    out, err = capsys.readouterr()
    assert "backbone.block_list.2.block_list.4" in out
    assert "0 of 5 blocks kept" in out
    assert err == ""

    onnx.checker.check_model(onnx.load(output))
    metadata = read_onnx_metadata(output)
    assert (metadata.variant, metadata.num_classes, metadata.precision) == ("S", 3, "int8")
    assert metadata.class_names == ("Platelets", "RBC", "WBC")
    assert (metadata.form, metadata.reg_max) == ("raw", 16)

    content = json.loads(report.read_text())
    assert [row["stays"] for row in content["blocks"]] == ["INT8"] * 5
    assert content["kept_float32"] == []
    assert content["all_int8"] == content["result"]
    with Image.open(plot) as image:
        assert image.format == "PNG"
    assert sorted(path.name for path in output.parent.iterdir()) == ["int8.onnx"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-size", "100", "96"], "--input-size is 100 96; accepted are multiples of 32"),
        (["--calibration", "absent"], "absent is no folder; --calibration takes a folder of images"),
    ],
)
def test_bad_options_are_refused_in_words(project_dir, tmp_path, capsys, options, message):
    command = ["--calibration", str(project_dir / "tests/data/smears"), "--output", str(tmp_path / "x.onnx")]
    assert quantize.main([*command, *options]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
