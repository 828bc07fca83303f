"""The measures that tell which blocks INT8 harms."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from lib.cli import ScriptError
from lib.onnx.qdq import calibrate, find_blocks
from lib.onnx.sensitivity import QuantizationEvaluator, fewest_kept, measure_blocks

from doubles.fragile_network import FRAGILE, with_fragile_block


@pytest.fixture(scope="module")
def evaluator(demo_network, smear_pixels):
    return QuantizationEvaluator(demo_network, smear_pixels)


def test_a_network_does_not_deviate_from_itself(evaluator, demo_network):
    deviation = evaluator.deviation_of(demo_network)
    assert (deviation.drift, deviation.loss) == (0.0, 0.0)
    # With jitter, not even float32 is perfect.
    assert 0.3 < evaluator.reference_ap < 0.95


def test_a_network_that_finds_nothing_loses_all(evaluator, demo_network):
    blind = onnx.ModelProto()
    blind.CopyFrom(demo_network)
    for tensor in blind.graph.initializer:
        if tensor.name.startswith("model.head.gfl_cls") and tensor.name.endswith("bias"):
            low = np.full(tensor.dims, -100, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(low, tensor.name))
    deviation = evaluator.deviation_of(blind)
    assert deviation.loss == evaluator.reference_ap
    assert deviation.drift >= 1.0


def test_a_fragile_block_is_ranked_first(demo_network, smear_pixels, evaluator):
    fragile = with_fragile_block(demo_network)
    assert evaluator.deviation_of(fragile).drift < 1e-3  # the same function in float32
    ranges = calibrate(fragile, smear_pixels)
    blocks = [block for block in find_blocks(fragile) if block.name.startswith("backbone.block_list.2")]
    ranked = measure_blocks(fragile, ranges, blocks, evaluator)
    assert len(ranked) == 5
    assert ranked[0].block.name == FRAGILE
    drifts = [each.deviation.drift for each in ranked]
    assert drifts == sorted(drifts, reverse=True)
    assert drifts[0] > 3 * drifts[1]
    assert drifts[-1] > 0


def test_images_without_anything_to_find_are_refused(demo_network):
    blank = np.full((2, 3, 64, 96), 128, np.uint8)
    with pytest.raises(ScriptError, match=r"finds nothing above a score of 0\.5 in the 2 images"):
        QuantizationEvaluator(demo_network, blank)
    with pytest.raises(ScriptError, match="no images to compare on; accepted is at least one"):
        QuantizationEvaluator(demo_network, blank[:0])


@pytest.mark.parametrize("needed", [0, 1, 2, 7, 19, 20])
def test_as_few_blocks_are_kept_as_the_loss_allows(needed):
    called = []

    def loss_of(kept):
        called.append(kept)
        return 0.005 if kept >= needed else 0.006

    assert fewest_kept(20, loss_of, 0.005) == needed
    assert len(called) == len(set(called)) <= 6
    assert 20 not in called
