"""Networks in QDQ format: blocks, ranges, and which values become 8-bit integers."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from lib.cli import ScriptError
from lib.onnx.qdq import calibrate, find_blocks, quantize_blocks
from lib.onnx.sensitivity import open_session

from damoyolo.backends import ONNX_FILE
from damoyolo.backends.onnx_metadata import INPUT_NAME, OUTPUT_NAMES, as_predictions
from damoyolo.backends.openvino_import import openvino_core
from damoyolo.boxes import decode_predictions

# Largest difference of a score with every block in INT8.
SCORE_TOLERANCE = 0.15
MEAN_SCORE_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def ranges(demo_network, smear_pixels):
    return calibrate(demo_network, smear_pixels)


def blocks_named(network, *starts):
    return [block for block in find_blocks(network) if block.name.startswith(starts)]


def int8_weights(network):
    """Names of the float32 weights that have become int8."""
    return {
        tensor.name.removesuffix("_quantized")
        for tensor in network.graph.initializer
        if tensor.data_type == TensorProto.INT8 and tensor.name.endswith("weight_quantized")
    }


@pytest.mark.parametrize("variant", ["S", pytest.param("M", marks=pytest.mark.slow)])
def test_every_node_is_in_one_block(variant, demo_network, golden_onnx_dir):
    # Variant M has a CSP backbone.
    network = demo_network if variant == "S" else onnx.load(golden_onnx_dir(variant) / ONNX_FILE)
    blocks = find_blocks(network)
    nodes = [name for block in blocks for name in block.nodes]
    all_nodes = list(network.graph.node)
    first = [node.op_type for node in all_nodes].index("Conv")
    assert sorted(nodes) == sorted(node.name for node in all_nodes[first:])
    weights = [tensor for tensor in network.graph.initializer if tensor.name.endswith(".weight")]
    assert sum(block.weights for block in blocks) == sum(int(np.prod(tensor.dims)) for tensor in weights)
    names = {block.name for block in blocks}
    assert len(names) > 20
    assert {"head.gfl_cls", "head.gfl_reg", "neck.merge_3", "neck.merge_3.convs.1"} <= names


def test_a_sum_belongs_to_the_block_that_ends_with_it(demo_network):
    kinds = {node.name: node.op_type for node in demo_network.graph.node}
    (block,) = blocks_named(demo_network, "backbone.block_list.2.block_list.1")
    assert sorted(kinds[name] for name in block.nodes) == ["Add", "Conv", "Conv", "Relu", "Relu"]


def test_a_network_of_other_names_and_no_images_are_refused(demo_network, smear_pixels):
    with pytest.raises(ScriptError, match="no images to calibrate with; accepted is at least one"):
        calibrate(demo_network, smear_pixels[:0])
    other = onnx.ModelProto()
    other.CopyFrom(demo_network)
    next(node for node in other.graph.node if node.op_type == "Conv").input[1] = "layer1.weight"
    with pytest.raises(ScriptError, match=r"layer1\.weight are in no known block.*export_onnx\.py"):
        find_blocks(other)
    del other.graph.node[:]
    with pytest.raises(ScriptError, match="no convolutions"):
        find_blocks(other)


def test_means_of_ranges_lie_within_the_extremes(demo_network, smear_pixels, ranges):
    means = calibrate(demo_network, smear_pixels, "mean")
    widths = {name: np.ptp(ranges[name].range_value) for name in ranges.keys()}  # noqa: SIM118
    mean_widths = {name: np.ptp(means[name].range_value) for name in means.keys()}  # noqa: SIM118
    assert widths.keys() == mean_widths.keys()
    assert all(mean_widths[name] <= widths[name] * (1 + 1e-6) for name in widths)
    assert sum(mean_widths.values()) < sum(widths.values())


def test_only_the_chosen_blocks_become_int8(demo_network, ranges):
    chosen = blocks_named(demo_network, "backbone.block_list.3", "neck.merge_5")
    quantized = quantize_blocks(demo_network, ranges, chosen)
    expected = {
        node.input[1]
        for node in demo_network.graph.node
        if node.op_type == "Conv" and any(node.name in block.nodes for block in chosen)
    }
    assert len(expected) == 15
    onnx.checker.check_model(quantized)
    assert int8_weights(quantized) == expected
    # The convolutions of the others have their weights as they were.
    networks = quantized, demo_network
    found, before = ({each.name: each for each in network.graph.initializer} for network in networks)
    for name in {node.input[1] for node in demo_network.graph.node if node.op_type == "Conv"} - expected:
        assert (found[name].data_type, found[name].raw_data) == (TensorProto.FLOAT, before[name].raw_data)
    assert int8_weights(demo_network) == set()


def test_weights_have_symmetric_scales_by_channel_and_pixels_pass_exactly(demo_network, ranges):
    quantized = quantize_blocks(demo_network, ranges, find_blocks(demo_network))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    weights = int8_weights(quantized)
    assert len(weights) == sum(node.op_type == "Conv" for node in demo_network.graph.node)
    for weight in weights:
        assert values[f"{weight}_scale"].shape == values[f"{weight}_quantized"].shape[:1]
        assert not values[f"{weight}_zero_point"].any()
    # Without VNNI two products are added in 16 bits: those of the stem, whose pixels reach 255, must fit.
    stem = next(node.input[1] for node in demo_network.graph.node if node.op_type == "Conv")
    for weight in weights:
        largest = np.abs(values[f"{weight}_quantized"].astype(int)).max()
        assert largest == (64 if weight == stem else 127)
    assert np.iinfo(np.int16).max >= 2 * 64 * 255
    entry = next(node for node in demo_network.graph.node if node.op_type == "Conv").input[0]
    first = next(
        node for node in quantized.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == entry
    )
    assert (values[first.input[1]], values[first.input[2]]) == (1.0, 0)


def test_for_tensorrt_there_are_no_zero_points_and_no_quantised_biases(demo_network, ranges):
    blocks = blocks_named(demo_network, "backbone.block_list.2", "neck")
    quantized = quantize_blocks(demo_network, ranges, blocks, "tensorrt")
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    pairs = [node for node in quantized.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()
    producers = {name: node.op_type for node in quantized.graph.node for name in node.output}
    for node in quantized.graph.node:
        if node.op_type == "Conv":
            assert node.input[2] not in producers
    assert sum(node.op_type == "Relu" for node in quantized.graph.node) == 75


def run_onnxruntime(network, pixels):
    return open_session(network).run(list(OUTPUT_NAMES), {INPUT_NAME: pixels})


def run_openvino(network, pixels):
    core = openvino_core()
    found = core.compile_model(core.read_model(network.SerializeToString()), "CPU")(pixels)
    return [found[name].copy() for name in OUTPUT_NAMES]


@pytest.mark.parametrize(
    ("target", "run"),
    [("onnxruntime", run_onnxruntime), ("openvino", run_openvino), ("openvino", run_onnxruntime)],
)
def test_int8_agrees_with_float32_in_both_backends(demo_network, smear_pixels, ranges, target, run):
    def decoded(outputs):
        return decode_predictions(as_predictions([torch.from_numpy(output) for output in outputs]))

    quantized = quantize_blocks(demo_network, ranges, find_blocks(demo_network), target)
    scores, boxes_xyxy = decoded(run(quantized, smear_pixels))
    expected_scores, expected_boxes_xyxy = decoded(run_onnxruntime(demo_network, smear_pixels))
    difference = (scores - expected_scores).abs()
    assert 0 < float(difference.max()) < SCORE_TOLERANCE
    assert float(difference.mean()) < MEAN_SCORE_TOLERANCE
    confident = expected_scores.amax(dim=-1) > 0.5
    assert confident.any()
    assert float((boxes_xyxy - expected_boxes_xyxy)[confident].abs().median()) < 1.0


def test_equal_images_give_equal_bytes(demo_network, smear_pixels, ranges):
    blocks = blocks_named(demo_network, "backbone.block_list.4")
    again = calibrate(demo_network, smear_pixels)
    first, second = (quantize_blocks(demo_network, each, blocks) for each in (ranges, again))
    assert first.SerializeToString() == second.SerializeToString()


def test_nothing_chosen_is_the_network_itself(demo_network, ranges):
    same = quantize_blocks(demo_network, ranges, [])
    del same.graph.value_info[:]  # inferred shapes
    assert same == demo_network


def test_for_openvino_no_pair_stands_between_a_convolution_and_its_activation_or_sum(demo_network, ranges):
    quantized = quantize_blocks(demo_network, ranges, find_blocks(demo_network))
    users = {}
    for node in quantized.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node.op_type)
    nodes = {name: node for node in quantized.graph.node for name in node.output}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear":
            # What is quantised goes into a convolution; pairs after SiLU made INT8 slower than bfloat16.
            (dequantized,) = next(
                each for each in quantized.graph.node if node.output[0] in each.input
            ).output
            assert "Conv" in users[dequantized]
        if node.op_type == "Conv":
            assert nodes[node.input[0]].op_type == nodes[node.input[1]].op_type == "DequantizeLinear"
    pairs = {name for node in nodes.values() if node.op_type == "QuantizeLinear" for name in node.input[:1]}
    outputs = {node.output[0] for node in quantized.graph.node if node.op_type == "Conv"}
    activated = {name for name in outputs if set(users.get(name, ())) & {"Add", "Relu", "Sigmoid"}}
    assert activated
    assert not activated & pairs
