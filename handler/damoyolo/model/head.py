"""ZeroHead: one convolution for the classes and one for the distances on each level, without a tower.

Source: tinyvision/DAMO-YOLO, damo/base_models/heads/zero_head.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from damoyolo.model.layers import LayerFactory
from damoyolo.model.variants import VariantSpec
from damoyolo.structures import RawPredictions


class DistanceBins(nn.Module):
    """The bins 0..R, which every checkpoint contains; only decoding, outside the network, uses them."""

    def __init__(self, reg_max: int) -> None:
        super().__init__()
        self.register_buffer("project", torch.arange(reg_max + 1, dtype=torch.float32))


class ZeroHead(nn.Module):
    """Neck features of strides 8, 16, 32 in, class and distance logits of each level out."""

    def __init__(self, variant: VariantSpec, num_classes: int, layers: LayerFactory) -> None:
        super().__init__()

        def predict(out_channels: int) -> nn.ModuleList:
            kernel_size = variant.head_kernel_size
            return nn.ModuleList(
                nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
                for in_channels in variant.neck_channels
            )

        self.integral = DistanceBins(variant.reg_max)
        self.gfl_cls = predict(num_classes)
        self.gfl_reg = predict(4 * (variant.reg_max + 1))
        self.scales = nn.ModuleList(layers.scale() for _ in variant.neck_channels)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> RawPredictions:
        return RawPredictions(
            # B,C,h,w -> B,K,h,w
            class_logits=tuple(conv(x) for conv, x in zip(self.gfl_cls, features, strict=True)),
            # B,C,h,w -> B,4*(R+1),h,w
            distance_logits=tuple(
                scale(conv(x)) for scale, conv, x in zip(self.scales, self.gfl_reg, features, strict=True)
            ),
        )
