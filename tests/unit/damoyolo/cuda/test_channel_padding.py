"""Padding with zero channels: which widths it gives, and that no value changes."""

import copy

import pytest
import torch
from torch import nn

from damoyolo.cuda.channel_padding import pad_between, pad_inner_channels, padded_width
from damoyolo.model.damoyolo import build_model
from damoyolo.model.layers import ResidualBlock
from damoyolo.model.variants import VARIANTS

# Of two computations in float64 of sums of a few hundred products of about one: far above their rounding.
CLOSE_IN_FLOAT64 = {"rtol": 0.0, "atol": 1e-10}


@pytest.mark.parametrize(
    ("channels", "width"),
    [
        (24, 32),
        (48, 64),
        (88, 96),
        (120, 128),
        (144, 160),
        (152, 160),
        (64, 64),
        (96, 96),
        (16, 16),
        (8, 8),
        (40, 40),
    ],
)
def test_a_width_is_padded_to_the_next_multiple_unless_that_is_far_away(channels, width):
    assert padded_width(channels) == width


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_between_two_convolutions_changes_no_value(activation, stride):
    torch.manual_seed(0)
    first, second = nn.Conv2d(16, 88, 1).double(), nn.Conv2d(88, 24, 3, stride, 1).double()
    x = torch.randn(2, 16, 9, 10, dtype=torch.float64)
    expected = second(activation(first(x)))
    pad_between(first, second)
    assert first.weight.shape == (96, 16, 1, 1)
    assert second.weight.shape == (24, 96, 3, 3)
    hidden = activation(first(x))
    assert not hidden[:, 88:].any()
    torch.testing.assert_close(second(hidden), expected, **CLOSE_IN_FLOAT64)


@pytest.mark.parametrize("name", ["S", "T", "Ns"])
def test_a_padded_network_predicts_the_same(name):
    torch.manual_seed(1)
    model = build_model(VARIANTS[name], 3, folded=True).double().requires_grad_(False)
    padded = copy.deepcopy(model)
    pad_inner_channels(padded)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64) * 255
    for found, expected in zip(padded(images), model(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-9)


def test_every_inner_width_of_s_is_padded():
    model = build_model(VARIANTS["S"], 3, folded=True)
    pad_inner_channels(model)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    widths = [block.conv1.conv1.out_channels for block in blocks]
    assert widths == [32] + [96] * 5 + [128] * 3 + [128] * 2 + [160]
    assert [block.conv2.in_channels for block in blocks] == widths


def test_mobile_blocks_are_left_alone():
    model = build_model(VARIANTS["Ns"], 3, folded=True)
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    pad_inner_channels(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
