"""The RepGFPN neck: fuses features of three strides, once top-down and once bottom-up.

Source: tinyvision/DAMO-YOLO, damo/base_models/necks/giraffe_fpn_btn.py.
"""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from damoyolo.model.layers import ConvNormAct, DepthwiseSeparableConv, LayerFactory, MobileBlock
from damoyolo.model.variants import VariantSpec


class RepBlock(nn.Module):
    """RepConv to the hidden width, 3x3 convolution back, shortcut; no activation after the sum."""

    def __init__(
        self, channels: int, hidden_channels: int, activation: type[nn.Module], layers: LayerFactory
    ) -> None:
        super().__init__()
        # Named and registered as in the checkpoints: conv2 runs first.
        self.conv1 = ConvNormAct(hidden_channels, channels, 3, activation, layers)
        self.conv2 = layers.rep_conv(channels, hidden_channels)
        self.act = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1(self.act(self.conv2(x)))


class FusionStage(nn.Module):
    """Two projections of the input; blocks run on the second, and every block's output is kept.

    The second projection itself takes no part in the result.
    """

    def __init__(
        self, in_channels: int, out_channels: int, variant: VariantSpec, layers: LayerFactory
    ) -> None:
        super().__init__()
        activation = variant.activation
        bypass_channels = out_channels // 2
        channels = out_channels - bypass_channels
        self.conv1 = ConvNormAct(in_channels, bypass_channels, 1, activation, layers)
        self.conv2 = ConvNormAct(in_channels, channels, 1, activation, layers)
        self.convs = nn.ModuleList(
            _build_block(channels, variant, layers) for _ in range(variant.neck_blocks)
        )
        kept_channels = bypass_channels + variant.neck_blocks * channels
        self.conv3 = ConvNormAct(kept_channels, out_channels, 1, activation, layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs, dim=1)  # B,Ci,h,w each -> B,sum of Ci,h,w
        kept, y = [self.conv1(x)], self.conv2(x)
        for block in self.convs:
            y = block(y)
            kept.append(y)
        return self.conv3(torch.cat(kept, dim=1))  # -> B,out,h,w


def _build_block(channels: int, variant: VariantSpec, layers: LayerFactory) -> nn.Module:
    if not variant.neck_depthwise:
        hidden_channels = int(channels * variant.neck_hidden_ratio)
        return RepBlock(channels, hidden_channels, variant.activation, layers)
    hidden_channels = (3 * channels + 4) // 8 * 8  # three times as wide, rounded to a multiple of 8
    block = MobileBlock(
        channels, hidden_channels, channels, 1, variant.activation, layers, attention_slot=False
    )
    return nn.Sequential(OrderedDict(conv=block))


class RepGfpn(nn.Module):
    """C3, C4, C5 (strides 8, 16, 32) in, three fused features of the same strides out."""

    def __init__(self, variant: VariantSpec, layers: LayerFactory) -> None:
        super().__init__()
        c3, c4, c5 = variant.backbone.out_channels
        p3, p4, p5 = variant.neck_channels

        def halve(channels: int) -> nn.Module:
            if variant.neck_depthwise:
                return DepthwiseSeparableConv(channels, variant.activation, layers)
            return ConvNormAct(channels, channels, 3, variant.activation, layers, stride=2)

        def fuse(in_channels: int, out_channels: int) -> nn.Module:
            return FusionStage(in_channels, out_channels, variant, layers)

        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.bu_conv13 = halve(c4)
        self.merge_3 = fuse(c5 + c4, c5)
        self.bu_conv24 = halve(c3)
        self.merge_4 = fuse(c4 + c3 + c5, c4)
        self.merge_5 = fuse(c3 + c4, p3)
        self.bu_conv57 = halve(p3)
        self.merge_7 = fuse(c4 + p3, p4)
        self.bu_conv46 = halve(c4)
        self.bu_conv76 = halve(p4)
        self.merge_6 = fuse(c5 + c4 + p4, p5)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        c3, c4, c5 = features
        x3 = self.merge_3(c5, self.bu_conv13(c4))  # c5@32
        x4 = self.merge_4(c4, self.bu_conv24(c3), self.upsample(x3))  # c4@16
        x5 = self.merge_5(c3, self.upsample(x4))  # p3@8
        x7 = self.merge_7(x4, self.bu_conv57(x5))  # p4@16
        x6 = self.merge_6(x3, self.bu_conv46(x4), self.bu_conv76(x7))  # p5@32
        return x5, x7, x6
