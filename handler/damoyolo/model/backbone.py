"""The TinyNAS backbones: images in, features C3, C4, C5 at strides 8, 16 and 32 out.

Source: tinyvision/DAMO-YOLO, damo/base_models/backbones/tinynas_{res,csp,mob}.py.
"""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from damoyolo.model.layers import (
    Focus,
    LayerFactory,
    MobileBlock,
    NasConvAct,
    ResidualBlock,
    SpatialPyramidPooling,
)
from damoyolo.model.variants import BackboneKind, BackboneSpec, StageSpec, VariantSpec

STAGE_STRIDES = (2, 2, 2, 1, 2)  # of the first block of a stage, in the residual and mobile backbones


class TinyNas(nn.Module):
    """Stem and five stages of residual or mobile blocks."""

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.block_list = nn.ModuleList([stem, *stages])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stem, stage_1, stage_2, stage_3, stage_4, stage_5 = self.block_list
        c3 = stage_2(stage_1(stem(images)))  # B,3,H,W -> B,C,H/8,W/8
        c4 = stage_4(stage_3(c3))  # -> B,C,H/16,W/16
        c5 = stage_5(c4)  # -> B,C,H/32,W/32
        return c3, c4, c5


class CspTinyNas(nn.Module):
    """Stem and four cross-stage-partial stages."""

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.csp_stage = nn.ModuleList([stem, *stages])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stem, stage_1, stage_2, stage_3, stage_4 = self.csp_stage
        c3 = stage_2(stage_1(stem(images)))  # B,3,H,W -> B,C,H/8,W/8
        c4 = stage_3(c3)  # -> B,C,H/16,W/16
        c5 = stage_4(c4)  # -> B,C,H/32,W/32
        return c3, c4, c5


class Stage(nn.Module):
    """Blocks in sequence."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.block_list = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_list(x)


class CspStage(nn.Module):
    """Halve the size, run residual blocks on half of the channels, and concatenate the other half.

    The four wrapping convolutions have ReLU, whatever the activation of the blocks inside.
    """

    def __init__(
        self,
        in_channels: int,
        spec: StageSpec,
        activation: type[nn.Module],
        layers: LayerFactory,
        *,
        spp: bool,
    ) -> None:
        super().__init__()
        out, half = spec.out_channels, spec.out_channels // 2
        self.convstem = nn.Sequential(
            *(
                ResidualBlock(half, spec.hidden_channels, half, 3, 1, activation, layers)
                for _ in range(spec.blocks)
            )
        )
        self.downsampler = NasConvAct(in_channels, out, 3, nn.ReLU, layers, stride=2)
        self.spp = SpatialPyramidPooling(out, layers) if spp else nn.Identity()
        self.conv_start = NasConvAct(out, half, 1, nn.ReLU, layers)
        self.conv_shortcut = NasConvAct(out, half, 1, nn.ReLU, layers)
        self.conv_fuse = NasConvAct(out, out, 1, nn.ReLU, layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spp(self.downsampler(x))  # B,C,H,W -> B,out,H/2,W/2
        y = self.convstem(self.conv_start(x))  # -> B,out/2,H/2,W/2
        return self.conv_fuse(torch.cat([y, self.conv_shortcut(x)], dim=1))


def build_backbone(variant: VariantSpec, layers: LayerFactory) -> nn.Module:
    """The backbone of a variant: (B, 3, H, W) RGB, 0..255, to C3, C4 and C5."""
    spec, activation = variant.backbone, variant.activation
    if spec.kind is BackboneKind.CSP:
        return _build_csp(spec, activation, layers)

    def block(in_channels: int, stage: StageSpec, stride: int) -> nn.Module:
        hidden, out = stage.hidden_channels, stage.out_channels
        if spec.kind is BackboneKind.RESIDUAL:
            return ResidualBlock(in_channels, hidden, out, 1, stride, activation, layers)
        return MobileBlock(in_channels, hidden, out, stride, activation, layers, attention_slot=True)

    return TinyNas(_build_stem(spec, activation, layers), _build_stages(spec, block, layers))


def _build_stem(spec: BackboneSpec, activation: type[nn.Module], layers: LayerFactory) -> nn.Module:
    if spec.focus_stem:
        return Focus(spec.stem_channels, activation, layers)
    return NasConvAct(3, spec.stem_channels, 3, activation, layers, stride=2)


def _build_stages(
    spec: BackboneSpec, block: Callable[[int, StageSpec, int], nn.Module], layers: LayerFactory
) -> list[nn.Module]:
    stages: list[nn.Module] = []
    in_channels = spec.stem_channels
    for stage, stride in zip(spec.stages, STAGE_STRIDES, strict=True):
        blocks = [block(in_channels, stage, stride)]
        if stage is spec.stages[-1]:
            blocks.append(SpatialPyramidPooling(stage.out_channels, layers))
        blocks += [block(stage.out_channels, stage, 1) for _ in range(stage.blocks - 1)]
        stages.append(Stage(blocks))
        in_channels = stage.out_channels
    return stages


def _build_csp(spec: BackboneSpec, activation: type[nn.Module], layers: LayerFactory) -> nn.Module:
    stages: list[nn.Module] = []
    in_channels = spec.stem_channels
    for stage in spec.stages:
        stages.append(CspStage(in_channels, stage, activation, layers, spp=stage is spec.stages[-1]))
        in_channels = stage.out_channels
    return CspTinyNas(_build_stem(spec, activation, layers), stages)
