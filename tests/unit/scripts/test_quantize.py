"""From a folder of images to an INT8 file, its table and its plot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from PIL import Image

from lib.onnx.qdq import QuantizationError, find_blocks
from lib.onnx.quantization import QuantizationRequest, split_images

import quantize
from damoyolo.backends.onnx_metadata import OnnxMetadata
from doubles.fragile_network import FRAGILE, with_fragile_block

# All but stage 2 of the backbone, so that a sweep takes seconds.
ALL_BUT_ONE_STAGE = ("head", "neck", *(f"backbone.block_list.{index}" for index in (0, 1, 3, 4, 5)))


def float_convolutions(network: onnx.ModelProto) -> set[str]:
    """Names of the convolution weights that are float32 in a file."""
    return {
        tensor.name
        for tensor in network.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and tensor.name.endswith(".weight")
    }


def test_no_image_serves_for_both() -> None:
    for count in (2, 3, 5, 47, 48, 300):
        calibration, check = split_images(count, QuantizationRequest())
        assert calibration
        assert check
        assert not set(calibration) & set(check)
        assert len(set(calibration)) == len(calibration) <= 32
        assert len(set(check)) == len(check) <= 16
        assert max(*calibration, *check) < count
    assert [len(part) for part in split_images(300, QuantizationRequest())] == [32, 16]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count: int) -> None:
    with pytest.raises(QuantizationError, match=f"{count} images given; accepted are 2 at least"):
        split_images(count, QuantizationRequest())


def test_a_fragile_block_stays_float32_and_the_loss_within_what_is_allowed(
    demo_network: onnx.ModelProto, smear_pixels: NDArray[np.uint8]
) -> None:
    fragile = with_fragile_block(demo_network, factor=2.0**16)
    request = QuantizationRequest(float_blocks=ALL_BUT_ONE_STAGE, progress=False)
    result = quantize.quantize(fragile, smear_pixels, request)
    assert result.all_int8.loss > request.max_loss >= result.deviation.loss
    assert result.kept[0] == FRAGILE
    assert len(result.kept) < len(result.ranked) == 5
    convolutions = {node.name: node.input[1] for node in fragile.graph.node if node.op_type == "Conv"}
    int8 = {each.block.name for each in result.ranked} - set(result.kept)
    assert float_convolutions(result.network) == {
        convolutions[node]
        for block in find_blocks(fragile)
        if block.name not in int8
        for node in block.nodes
        if node in convolutions
    }


def test_what_cannot_be_reached_is_said(
    demo_network: onnx.ModelProto, smear_pixels: NDArray[np.uint8]
) -> None:
    one_block = (*ALL_BUT_ONE_STAGE, *(f"backbone.block_list.2.block_list.{index}" for index in (0, 2, 3, 4)))
    fragile = with_fragile_block(demo_network, factor=2.0**16)
    with pytest.raises(QuantizationError, match=r"a loss of 0 AP leaves nothing in INT8.*raise --max-loss"):
        quantize.quantize(
            fragile, smear_pixels, QuantizationRequest(max_loss=0.0, float_blocks=one_block, progress=False)
        )
    with pytest.raises(QuantizationError, match=r"no block is called nek; accepted are none, or .*neck\."):
        quantize.quantize(demo_network, smear_pixels, QuantizationRequest(float_blocks=("nek",)))
    with pytest.raises(QuantizationError, match="every block of the network is to stay float32"):
        quantize.quantize(
            demo_network, smear_pixels, QuantizationRequest(float_blocks=("head", "neck", "backbone"))
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib and what it imports
def test_the_command_line_writes_file_report_and_plot(
    project_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, report, plot = tmp_path / "new" / "int8.onnx", tmp_path / "a" / "b.json", tmp_path / "c" / "d.png"
    command = ["--calibration", str(project_dir / "tests/data/smears"), "--input-size", "256", "320"]
    command += ["--keep-float", ",".join(ALL_BUT_ONE_STAGE), "--max-loss", "0.5", "--no-progress"]
    assert (
        quantize.main([*command, "--output", str(output), "--report", str(report), "--plot", str(plot)]) == 0
    )
    out, err = capsys.readouterr()
    assert "backbone.block_list.2.block_list.4" in out
    assert "0 of 5 blocks kept" in out
    assert err == ""

    written = onnx.load(output)
    onnx.checker.check_model(written)
    facts = OnnxMetadata.from_metadata({entry.key: entry.value for entry in written.metadata_props}, output)
    assert (facts.variant, facts.num_classes, facts.precision, facts.form) == ("S", 3, "int8", "raw")
    assert facts.class_names == ("Platelets", "RBC", "WBC")
    assert facts.reg_max == 16

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
        (["--weights", "absent.pth"], "absent.pth is neither a file"),
    ],
)
def test_bad_options_are_said_in_words(
    project_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    command = ["--calibration", str(project_dir / "tests/data/smears"), "--output", str(tmp_path / "x.onnx")]
    assert quantize.main([*command, *options]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_readable_images_is_said_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = tmp_path / "images", tmp_path / "x.onnx"
    command = ["--calibration", str(images), "--output", str(output)]
    assert quantize.main(command) == 1
    assert "does not exist; --calibration takes a folder of images" in capsys.readouterr().err
    images.mkdir()
    assert quantize.main(command) == 1
    assert "holds no images" in capsys.readouterr().err
    (images / "broken.jpg").write_bytes(b"no image")
    assert quantize.main(command) == 1
    assert "broken.jpg: the data are no image" in capsys.readouterr().err
    assert not output.exists()
