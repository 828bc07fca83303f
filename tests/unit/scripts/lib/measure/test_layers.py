"""The distinct layers of a fused network, their operations and bytes."""

import pytest
import torch

from lib.measure.ablation import flop_per_image
from lib.measure.cudnn_plans import ConvSpec
from lib.measure.layers import Pointwise, Stem, describe, distinct_layers, flop, least_bytes
from lib.paths import DEMO_WEIGHTS

from damoyolo.cuda.fuse import FuseOptions, fuse
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS


@pytest.fixture(scope="module")
def layers():
    fused = fuse(build_model(VARIANTS["S"], 3, folded=True), FuseOptions(channel_padding=False))
    return distinct_layers(fused, (2, 3, 640, 640))


def test_the_layers_of_s_have_all_operations_of_the_network(layers):
    total = sum(flop(layer.work) * layer.count for layer in layers) / 2
    # Merging class and distance convolutions pads 71 channels to 72, at 80x80, 40x40 and 20x20.
    padding = 2 * 9 * (128 * 6400 + 256 * 1600 + 512 * 400)
    assert total - padding == flop_per_image(DEMO_WEIGHTS, 3)


def test_layers_are_told_apart_by_what_happens_around_the_convolution(layers):
    counts = {layer.name: layer.count for layer in layers}
    assert counts["3x3 88->128 at 80x80 + shortcut"] == 4
    assert counts["3x3 /2 88->128 at 160x160"] == 1
    assert counts["3x3 96->128 at 40x40, then + shortcut"] == 6
    assert counts["3x3 128->72 at 80x80, linear"] == 1
    assert counts["1x1 128+256up->64+64 at 80x80, own kernel"] == 1
    assert counts["stem 3->32->24 at 640x640, own kernel"] == 1
    assert len(counts) == len(layers)


def test_bytes_are_inputs_weights_and_outputs_once():
    conv = ConvSpec(2, 32, 64, 10, 20, 3, 2, torch.float16, torch.float16, addend="before")
    output = 2 * 64 * 5 * 10
    assert least_bytes(conv) == 2 * (2 * 32 * 200 + 64 * 32 * 9 + 2 * output)
    assert flop(conv) == 2 * output * 32 * 9
    pointwise = Pointwise(2, ((16, 10, 20), (8, 5, 10)), (False, True), (24, 8), 10, 20, "relu")
    assert least_bytes(pointwise) == 2 * 2 * (16 * 200 + 8 * 50 + 32 * 200)
    assert flop(pointwise) == 2 * 2 * 200 * 24 * 32
    stem = Stem(1, 8, 8, 32, 24, "relu")
    assert flop(stem) == 2 * 16 * (108 * 32 + 32 * 24)
    assert least_bytes(stem) == 8 * 8 * 3 + 16 * 24 * 2
    assert describe(stem) == "stem 3->32->24 at 8x8, own kernel"
