"""Quantising a network: which images and blocks are used for what, and what is refused."""

import pytest
from onnx import TensorProto

from lib.cli import ScriptError
from lib.onnx.options import QuantizationRequest
from lib.onnx.qdq import find_blocks
from lib.onnx.quantization import always_float, image_paths, quantize, read_pixels, split_images

from doubles.fragile_network import ALL_BUT_ONE_STAGE, FRAGILE, with_fragile_block


def float_convolutions(network):
    """Names of the convolution weights that are float32 in a file."""
    return {
        tensor.name
        for tensor in network.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and tensor.name.endswith(".weight")
    }


def test_no_image_serves_for_both():
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
def test_fewer_than_two_images_are_refused(count):
    with pytest.raises(ScriptError, match=f"{count} images given; accepted are at least 2"):
        split_images(count, QuantizationRequest())


def test_a_fragile_block_stays_float32_and_the_loss_within_what_is_allowed(demo_network, smear_pixels):
    fragile = with_fragile_block(demo_network, factor=2.0**16)
    request = QuantizationRequest(float_blocks=ALL_BUT_ONE_STAGE, progress=False)
    result = quantize(fragile, smear_pixels, request)
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


def test_a_loss_out_of_reach_and_unknown_blocks_are_refused(demo_network, smear_pixels):
    one_block = (*ALL_BUT_ONE_STAGE, *(f"backbone.block_list.2.block_list.{index}" for index in (0, 2, 3, 4)))
    fragile = with_fragile_block(demo_network, factor=2.0**16)
    with pytest.raises(ScriptError, match=r"a loss of 0 AP leaves nothing in INT8.*raise --max-loss"):
        quantize(
            fragile, smear_pixels, QuantizationRequest(max_loss=0.0, float_blocks=one_block, progress=False)
        )
    with pytest.raises(ScriptError, match=r"no block is called nek; accepted are none, or .*neck\."):
        quantize(demo_network, smear_pixels, QuantizationRequest(float_blocks=("nek",)))
    with pytest.raises(ScriptError, match="every block of the network is to stay float32"):
        quantize(demo_network, smear_pixels, QuantizationRequest(float_blocks=("head", "neck", "backbone")))


def test_the_stem_stays_float32_for_tensorrt_unless_told_otherwise(demo_network):
    blocks = find_blocks(demo_network)
    for target, named, expected in [
        ("tensorrt", None, ("backbone.block_list.0",)),
        ("tensorrt", ("none",), ()),
        ("openvino", None, ()),
        ("onnxruntime", ("head",), ("head",)),
    ]:
        request = QuantizationRequest(target=target, float_blocks=named)
        assert always_float(blocks, request) == expected


def test_a_folder_without_readable_images_is_refused(tmp_path):
    images = tmp_path / "images"
    with pytest.raises(ScriptError, match="is no folder; --calibration takes a folder of images"):
        image_paths(images, 2)
    images.mkdir()
    with pytest.raises(ScriptError, match="holds no images"):
        image_paths(images, 2)
    (images / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ScriptError, match=r"broken\.jpg: the data are no image.*folder of --calibration"):
        read_pixels(image_paths(images, 2), "S", (64, 64))
