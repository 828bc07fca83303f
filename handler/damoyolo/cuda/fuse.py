"""Fuse the layers of a folded network for inference: the same values within rounding, in less time.

`fuse` copies the network and replaces the blocks that it knows; every other block stays as it is. The result
takes uint8 pixels, can be captured in a CUDA graph, and can be moved and converted with `.to`. It must not
run under autocast, which does not know the fused calls.
"""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from damoyolo.cuda.channel_padding import pad_inner_channels
from damoyolo.cuda.fused_conv import (
    ACTIVATION_NAMES,
    FusedConv,
    FusedRepBlock,
    FusedResidualBlock,
    bias_of,
    frozen,
)
from damoyolo.cuda.kernels.pointwise import pointwise_conv
from damoyolo.cuda.kernels.pooling import pyramid_max_pool
from damoyolo.cuda.kernels.stem import focus_stem, focus_stem_reference
from damoyolo.model.backbone import CspStage, Stage
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.model.head import ZeroHead
from damoyolo.model.layers import ConvNormAct, Focus, NasConvAct, ResidualBlock, SpatialPyramidPooling
from damoyolo.model.neck import FusionStage, RepBlock, RepGfpn
from damoyolo.model.pixel_stem import focus_weight_on_pixels
from damoyolo.structures import RawPredictions

# Limits of pointwise_conv.
POINTWISE_INPUTS = 5
POINTWISE_CHANNEL_MULTIPLE = 8
HEAD_CHANNEL_MULTIPLE = 8  # otherwise cuDNN's 16-bit tensor-core kernels pad the output in an extra pass


@dataclass(frozen=True)
class FuseOptions:
    """Which fusions to apply.

    stem: Focus, its convolution and, where one follows, the 1x1 convolution as one call on the pixels.
    pooling: the maxima of the spatial pyramid pooling in one pass.
    pointwise: 1x1 convolutions read their inputs in place, instead of from a concatenation of upsampled
        copies; two of them over the same input become one.
    merged_head: class and distance convolution of a level become one.
    cudnn_epilogue: bias, shortcut and ReLU inside cuDNN's convolution; with another activation than ReLU, the
        three in one pass after it.
    channel_padding: the tensors inside a block get as many channels as cuDNN serves well; the added ones are
        zero.
    """

    stem: bool = True
    pooling: bool = True
    pointwise: bool = True
    merged_head: bool = True
    cudnn_epilogue: bool = True
    channel_padding: bool = True


class FusedDamoYolo(DamoYolo):
    """The network that `fuse` returns: pixels in, raw predictions out."""

    def forward(self, pixels: Tensor) -> RawPredictions:
        """Predict for a batch.

        pixels: (B, 3, H, W), RGB, uint8 or any floating-point type with values 0..255; channels_last is
            fastest. H and W multiples of 32.

        Returns:
            Predictions in the type of the weights; with `merged_head` they are views of one tensor per level.
        """
        return self.head(self.neck(self.backbone(pixels)))


def fuse(model: DamoYolo, options: FuseOptions | None = None) -> FusedDamoYolo:
    """A fused copy of a folded network, which itself stays unchanged; by default with all fusions.

    Raises:
        ValueError: the network is not folded.
    """
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise ValueError("the network has BatchNorm; fuse takes one of build_model(..., folded=True)")
    options = options or FuseOptions()
    plain = copy.deepcopy(model).requires_grad_(False).eval()
    fused = FusedDamoYolo(plain.backbone, plain.neck, plain.head, plain.variant, plain.num_classes)
    if options.channel_padding:
        pad_inner_channels(fused)
    fuse_stem(fused.backbone, fuse_pointwise=options.stem)
    if options.pooling:
        replace_modules(fused, fused_pooling)
    if options.pointwise:
        fuse_upsampling(cast(RepGfpn, fused.neck))
        replace_modules(fused, concat_free)
    if options.merged_head:
        fused.head = MergedHead(cast(ZeroHead, fused.head))
    if options.cudnn_epilogue:
        replace_modules(fused, fused_epilogue)
    return fused.to(memory_format=torch.channels_last).eval()


def replace_modules(root: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace each module below `root` by `replacement(module)` where that is not None.

    From the outside in: the modules inside a replacement are visited in turn.
    """
    for name, child in list(root.named_children()):
        replaced = replacement(child)
        if replaced is not None:
            setattr(root, name, replaced)
        replace_modules(child if replaced is None else replaced, replacement)


# ---- stem --------------------------------------------------------------------------------------------------


class PlainStem(nn.Module):
    """An unchanged stem that first converts pixels to the type of its weights."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem

    def forward(self, pixels: Tensor) -> Tensor:
        dtype = next(self.stem.parameters()).dtype
        return self.stem(pixels.to(dtype, memory_format=torch.channels_last))


class PixelStem(nn.Module):
    """Focus and its convolution, optionally with a 1x1 convolution of the same activation, as one call."""

    def __init__(self, focus: Focus, pointwise: nn.Conv2d | None) -> None:
        super().__init__()
        self.weight = frozen(focus_weight_on_pixels(focus.conv.conv.weight))
        self.bias = frozen(bias_of(focus.conv.conv))
        self.pointwise_weight = None if pointwise is None else frozen(pointwise.weight.flatten(1))
        self.pointwise_bias = None if pointwise is None else frozen(bias_of(pointwise))
        self.activation = ACTIVATION_NAMES[type(focus.conv.act)]

    def forward(self, pixels: Tensor) -> Tensor:
        # The kernel takes integers 0..255 only; other types may hold values in between.
        stem = focus_stem if pixels.dtype == torch.uint8 else focus_stem_reference
        return stem(
            pixels.contiguous(memory_format=torch.channels_last),
            self.weight,
            self.bias,
            self.pointwise_weight,
            self.pointwise_bias,
            self.weight.dtype,
            self.activation,
        )


class StridedBlockTail(nn.Module):
    """The rest of a `ResidualBlock` without shortcut whose first convolution was fused into the stem."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.conv2 = cast(nn.Conv2d, block.conv2)
        self.act = block.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(x))


def fuse_stem(backbone: nn.Module, *, fuse_pointwise: bool) -> None:
    """Let the stem of a backbone take pixels; with `fuse_pointwise`, also fuse what surrounds it (`stem`)."""
    blocks = next(backbone.children())
    assert isinstance(blocks, nn.ModuleList)
    stem, first_stage = blocks[0], blocks[1]
    if not fuse_pointwise or not isinstance(stem, Focus):
        blocks[0] = PlainStem(stem)
        return
    pointwise = None
    if isinstance(first_stage, Stage):
        first = next(first_stage.block_list.children())
        # A shortcut would need the output of the stem a second time.
        if (
            isinstance(first, ResidualBlock)
            and not first.has_shortcut
            and first.conv1.conv1.kernel_size == (1, 1)
        ):
            pointwise = first.conv1.conv1
            first_stage.block_list[0] = StridedBlockTail(first)
    blocks[0] = PixelStem(stem, pointwise)


# ---- pooling -----------------------------------------------------------------------------------------------


class OnePassPyramidPooling(nn.Module):
    """`SpatialPyramidPooling` with the three maxima and the concatenation in one pass."""

    def __init__(self, pooling: SpatialPyramidPooling) -> None:
        super().__init__()
        self.conv1 = pooling.conv1
        self.conv2 = pooling.conv2

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(pyramid_max_pool(self.conv1(x)))  # B,C,h,w -> B,C/2 * 4,h,w -> B,C,h,w


def fused_pooling(module: nn.Module) -> nn.Module | None:
    """The fusion `pooling` of one module; None where it does not apply."""
    return OnePassPyramidPooling(module) if isinstance(module, SpatialPyramidPooling) else None


# ---- pointwise ---------------------------------------------------------------------------------------------


class PointwiseConv(nn.Module):
    """1x1 convolutions with activation over the same inputs, without concatenating them.

    upsampled: for each input, whether it has half the size and each pixel is read 2x2 times.
    """

    def __init__(
        self, convs: Sequence[nn.Conv2d], activation: nn.Module, upsampled: tuple[bool, ...] | None = None
    ) -> None:
        super().__init__()
        self.weight = frozen(torch.cat([conv.weight for conv in convs]).flatten(1))  # sum of O,sum of I
        self.bias = frozen(torch.cat([bias_of(conv) for conv in convs]))
        self.out_channels = tuple(conv.out_channels for conv in convs)
        self.activation = ACTIVATION_NAMES[type(activation)]
        self.upsampled = upsampled

    def split(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The output of each convolution, in a tensor of its own."""
        return pointwise_conv(
            inputs, self.weight, self.bias, self.activation, self.upsampled, self.out_channels
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output of the only convolution."""
        (output,) = self.split(*inputs)
        return output


def takes_pointwise(channels: Sequence[int]) -> bool:
    """Whether `PointwiseConv` takes inputs of these numbers of channels."""
    return len(channels) <= POINTWISE_INPUTS and not any(C % POINTWISE_CHANNEL_MULTIPLE for C in channels)


class ConcatConv(nn.Module):
    """A convolution of several inputs that does concatenate them."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.conv(torch.cat(inputs, dim=1))


class ConcatFreeFusionStage(nn.Module):
    """`FusionStage` without concatenations and with its two projections as one."""

    def __init__(self, stage: FusionStage, upsampled: tuple[bool, ...] | None = None) -> None:
        super().__init__()
        self.projections = PointwiseConv([stage.conv1.conv, stage.conv2.conv], stage.conv1.act, upsampled)
        self.convs = stage.convs
        kept = (stage.conv1.conv.out_channels, *[stage.conv2.conv.out_channels] * len(stage.convs))
        self.conv3: nn.Module
        if takes_pointwise(kept):
            self.conv3 = PointwiseConv([stage.conv3.conv], stage.conv3.act)
        else:
            self.conv3 = ConcatConv(stage.conv3)

    def forward(self, *inputs: Tensor) -> Tensor:
        bypass, y = self.projections.split(*inputs)  # B,Ci,h,w each -> two of B,C,h,w
        kept = [bypass]
        for block in self.convs:
            y = block(y)
            kept.append(y)
        return self.conv3(*kept)  # -> B,out,h,w


class ConcatFreeCspStage(nn.Module):
    """`CspStage` without the concatenation and with its two projections as one."""

    def __init__(self, stage: CspStage) -> None:
        super().__init__()
        self.downsampler = stage.downsampler
        self.spp = stage.spp
        starts = [stage.conv_start.conv.conv1, stage.conv_shortcut.conv.conv1]
        self.projections = PointwiseConv(starts, stage.conv_start.act)
        self.convstem = stage.convstem
        self.conv_fuse = PointwiseConv([stage.conv_fuse.conv.conv1], stage.conv_fuse.act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spp(self.downsampler(x))  # B,C,H,W -> B,out,H/2,W/2
        y, shortcut = self.projections.split(x)  # -> two of B,out/2,H/2,W/2
        return self.conv_fuse(self.convstem(y), shortcut)


def concat_free(module: nn.Module) -> nn.Module | None:
    """The fusion `pointwise` of one module; None where it does not apply."""
    if isinstance(module, FusionStage):
        return ConcatFreeFusionStage(module)
    if isinstance(module, CspStage):
        return ConcatFreeCspStage(module)
    if (
        isinstance(module, ConvNormAct)
        and module.conv.kernel_size == (1, 1)
        and isinstance(module.act, nn.SiLU)  # with ReLU, cuDNN does it in one call, too
        and takes_pointwise([module.conv.in_channels])
    ):
        return PointwiseConv([module.conv], module.act)
    return None


def fuse_upsampling(neck: RepGfpn) -> None:
    """The fusion `pointwise` of the two stages of a neck that read upsampled features."""
    neck.add_module("upsample", nn.Identity())
    neck.merge_4 = ConcatFreeFusionStage(cast(FusionStage, neck.merge_4), upsampled=(False, False, True))
    neck.merge_5 = ConcatFreeFusionStage(cast(FusionStage, neck.merge_5), upsampled=(False, True))


# ---- head --------------------------------------------------------------------------------------------------


class MergedHead(nn.Module):
    """`ZeroHead` with one convolution per level; its output channels are distances, classes, padding."""

    def __init__(self, head: ZeroHead) -> None:
        super().__init__()
        pairs = [
            (cast(nn.Conv2d, distances), cast(nn.Conv2d, classes))
            for distances, classes in zip(head.gfl_reg, head.gfl_cls, strict=True)
        ]
        self.distance_channels = pairs[0][0].out_channels
        self.class_channels = pairs[0][1].out_channels
        self.convs = nn.ModuleList(merge_convs(pair, HEAD_CHANNEL_MULTIPLE) for pair in pairs)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> RawPredictions:
        merged = [conv(x) for conv, x in zip(self.convs, features, strict=True)]  # B,4*(R+1)+K+padding,h,w
        return RawPredictions(
            class_logits=tuple(y.narrow(1, self.distance_channels, self.class_channels) for y in merged),
            distance_logits=tuple(y.narrow(1, 0, self.distance_channels) for y in merged),
        )


def merge_convs(convs: Sequence[nn.Conv2d], channel_multiple: int) -> nn.Conv2d:
    """One convolution for several of the same input, its output padded by zeros to a multiple of channels."""
    padding = -sum(conv.out_channels for conv in convs) % channel_multiple
    weight = F.pad(torch.cat([conv.weight for conv in convs]), (0, 0) * 3 + (0, padding))
    bias = F.pad(torch.cat([bias_of(conv) for conv in convs]), (0, padding))
    first = convs[0]
    merged = nn.Conv2d(first.in_channels, len(bias), first.kernel_size[0], padding=first.kernel_size[0] // 2)
    merged.weight, merged.bias = frozen(weight), frozen(bias)
    return merged


# ---- epilogue ----------------------------------------------------------------------------------------------


def fused_epilogue(module: nn.Module) -> nn.Module | None:
    """The fusion `cudnn_epilogue` of one module; None for others, such as depthwise convolutions."""
    if isinstance(module, ResidualBlock):
        return FusedResidualBlock(module)
    if isinstance(module, RepBlock):
        return FusedRepBlock(module)
    if isinstance(module, ConvNormAct):
        return FusedConv(module.conv, ACTIVATION_NAMES[type(module.act)])
    if isinstance(module, NasConvAct):
        return FusedConv(module.conv.conv1, ACTIVATION_NAMES[type(module.act)])
    if isinstance(module, StridedBlockTail):
        return FusedConv(module.conv2, ACTIVATION_NAMES[type(module.act)])
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return FusedConv(module, "none")
    return None
