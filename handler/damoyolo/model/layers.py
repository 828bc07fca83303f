"""The building blocks of backbone, neck and head.

A network has two forms with the same blocks: as trained (convolutions followed by BatchNorm, RepConv of two
branches, learned scales) and folded (plain convolutions with bias). They differ only in the layers that a
`LayerFactory` makes. Attribute names are the key names of the official checkpoints.

Source: tinyvision/DAMO-YOLO, damo/base_models/core/ops.py and damo/base_models/backbones.
"""
# Calling a module returns Any, which strict checking would require every forward to narrow.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH_NORM_EPS = 1e-3  # of every BatchNorm; torch's default changes the results visibly


@dataclass(frozen=True)
class LayerFactory:
    """Makes the layers that differ between the two forms of a network."""

    folded: bool

    def conv(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
    ) -> nn.Conv2d:
        """A convolution padded to keep the size at stride 1, to be followed by `norm`."""
        padding = kernel_size // 2
        return nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=self.folded
        )

    def norm(self, channels: int) -> nn.Module:
        """What follows a convolution of this factory."""
        return nn.Identity() if self.folded else nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS, momentum=0.03)

    def rep_conv(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        """A RepConv without its activation."""
        if self.folded:
            return self.conv(in_channels, out_channels, 3, stride)
        return RepConv(in_channels, out_channels, stride, self)

    def scale(self) -> nn.Module:
        """The learned factor of a level's distance logits."""
        return nn.Identity() if self.folded else Scale()


class RepConv(nn.Module):
    """A 3x3 and a 1x1 convolution of the same input, summed; there is no identity branch."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, layers: LayerFactory) -> None:
        super().__init__()
        self.rbr_dense = _conv_norm(in_channels, out_channels, 3, stride, layers)
        self.rbr_1x1 = _conv_norm(in_channels, out_channels, 1, stride, layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.rbr_dense(x) + self.rbr_1x1(x)


def _conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, layers: LayerFactory
) -> nn.Module:
    conv = layers.conv(in_channels, out_channels, kernel_size, stride)
    return nn.Sequential(OrderedDict(conv=conv, bn=layers.norm(out_channels)))


class Scale(nn.Module):
    """One learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ConvNormAct(nn.Module):
    """Convolution, normalisation, activation: the unit of stem, SPP and neck."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        activation: type[nn.Module],
        layers: LayerFactory,
        *,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv = layers.conv(in_channels, out_channels, kernel_size, stride)
        self.bn = layers.norm(out_channels)
        self.act = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class NasConv(nn.Module):
    """Convolution and normalisation under the key names of the TinyNAS blocks, without activation."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, layers: LayerFactory, *, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, out_channels, kernel_size, stride)
        self.bn1 = layers.norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))


class NasConvAct(nn.Module):
    """`NasConv` with an activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        activation: type[nn.Module],
        layers: LayerFactory,
        *,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv = NasConv(in_channels, out_channels, kernel_size, layers, stride=stride)
        self.act = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Focus(nn.Module):
    """Stem that turns each 2x2 pixels into channels and convolves them."""

    def __init__(self, out_channels: int, activation: type[nn.Module], layers: LayerFactory) -> None:
        super().__init__()
        self.conv = ConvNormAct(12, out_channels, 3, activation, layers)

    def forward(self, images: Tensor) -> Tensor:
        top_left, bottom_left = images[..., ::2, ::2], images[..., 1::2, ::2]
        top_right, bottom_right = images[..., ::2, 1::2], images[..., 1::2, 1::2]
        grids = torch.cat([top_left, bottom_left, top_right, bottom_right], dim=1)  # B,3,H,W -> B,12,H/2,W/2
        return self.conv(grids)


class SpatialPyramidPooling(nn.Module):
    """The input and its maxima over 5x5, 9x9 and 13x13, concatenated; SiLU in every variant."""

    def __init__(self, channels: int, layers: LayerFactory) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(channels, channels // 2, 1, nn.SiLU, layers)
        self.conv2 = ConvNormAct(channels * 2, channels, 1, nn.SiLU, layers)
        self.max_5x5 = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        over_5x5 = self.max_5x5(x)
        over_9x9 = self.max_5x5(over_5x5)  # a maximum of maxima: exactly the wider window, with less work
        over_13x13 = self.max_5x5(over_9x9)
        return self.conv2(torch.cat([x, over_5x5, over_9x9, over_13x13], dim=1))


class ResidualBlock(nn.Module):
    """Convolution to the hidden width, RepConv back; a shortcut at stride 1."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        activation: type[nn.Module],
        layers: LayerFactory,
    ) -> None:
        super().__init__()
        self.conv1 = NasConv(in_channels, hidden_channels, kernel_size, layers)
        self.conv2 = layers.rep_conv(hidden_channels, out_channels, stride)
        self.act = activation(inplace=True)
        self.has_shortcut = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.act(self.conv1(x)))
        return self.act(y + x if self.has_shortcut else y)


class MobileBlock(nn.Module):
    """Expand by 1x1, depthwise 5x5, project by 1x1; a shortcut where the shape stays, no activation after.

    attention_slot: reserve the number of an (absent) attention module among the layers, as the checkpoints
        do in the backbones and not in the necks.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        stride: int,
        activation: type[nn.Module],
        layers: LayerFactory,
        *,
        attention_slot: bool,
    ) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            layers.conv(in_channels, hidden_channels, 1),
            layers.norm(hidden_channels),
            activation(inplace=True),
            layers.conv(hidden_channels, hidden_channels, 5, stride, groups=hidden_channels),
            layers.norm(hidden_channels),
            *([nn.Identity()] if attention_slot else []),
            activation(inplace=True),
            layers.conv(hidden_channels, out_channels, 1),
            layers.norm(out_channels),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.has_shortcut else y


class DepthwiseSeparableConv(nn.Module):
    """Depthwise 3x3 of stride 2 and 1x1, each with normalisation and activation."""

    def __init__(self, channels: int, activation: type[nn.Module], layers: LayerFactory) -> None:
        super().__init__()
        self.depthwise = layers.conv(channels, channels, 3, stride=2, groups=channels)
        self.pointwise = layers.conv(channels, channels, 1)
        self.dwnorm = layers.norm(channels)
        self.pwnorm = layers.norm(channels)
        self.act = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dwnorm(self.depthwise(x)))
        return self.act(self.pwnorm(self.pointwise(x)))
