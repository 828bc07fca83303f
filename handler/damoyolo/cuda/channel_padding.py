"""Pad the inner channels of a folded network's blocks with zeros: the same values in fewer microseconds.

cuDNN's tensor-core kernels work in tiles of channels. A width that does not fill its tiles costs more than
the next one that does, although the wider convolution has more operations: on an H200 at batch 64, a 3x3
convolution of 88 channels to 128 at 80x80 takes 211 us, one of 96 channels 144.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from damoyolo.model.layers import ResidualBlock
from damoyolo.model.neck import RepBlock

CHANNEL_MULTIPLE = 32
# Widening by more than this costs more than it gains.
MAX_WIDENING = 1 / 3


def padded_width(channels: int) -> int:
    """The width to which that many inner channels are padded; the same number where padding does not pay."""
    width = channels + -channels % CHANNEL_MULTIPLE
    return width if width - channels <= channels * MAX_WIDENING else channels


def pad_inner_channels(model: nn.Module) -> None:
    """Widen the tensors between the two convolutions of each block of a folded network, in place.

    Exact: the added outputs of the first convolution have weights and biases of zero, every activation of the
    network maps zero to zero, and the second convolution multiplies them by zero. Nothing outside a block
    changes. Blocks with depthwise convolutions are left alone: these do not run on tensor cores.
    """
    for block in model.modules():
        if isinstance(block, ResidualBlock):
            pad_between(block.conv1.conv1, cast(nn.Conv2d, block.conv2))
        elif isinstance(block, RepBlock):
            pad_between(cast(nn.Conv2d, block.conv2), block.conv1.conv)  # conv2 runs first


def pad_between(first: nn.Conv2d, second: nn.Conv2d) -> None:
    """Pad the outputs of one convolution and the inputs of the next to `padded_width` channels, in place."""
    channels = first.out_channels
    added = padded_width(channels) - channels
    if not added:
        return
    assert first.bias is not None
    assert first.groups == second.groups == 1
    assert second.in_channels == channels
    first.weight = _parameter(F.pad(first.weight, (0, 0, 0, 0, 0, 0, 0, added)))  # O,I,k,k -> O+a,I,k,k
    first.bias = _parameter(F.pad(first.bias, (0, added)))
    second.weight = _parameter(F.pad(second.weight, (0, 0, 0, 0, 0, added)))  # O,I,k,k -> O,I+a,k,k
    first.out_channels = second.in_channels = channels + added


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
