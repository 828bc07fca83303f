"""The distinct layers of a fused network: shapes, operations, bytes, and the least time that a chip needs."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.measure.cudnn_plans import Addend, ConvSpec

from damoyolo.cuda.fuse import PixelStem, PointwiseConv
from damoyolo.cuda.fused_conv import FusedConv, FusedRepBlock
from damoyolo.cuda.kernels import Activation

BYTES = {torch.float16: 2, torch.bfloat16: 2, torch.int8: 1}


@dataclass(frozen=True)
class Pointwise:
    """A 1x1 convolution over several inputs, some at half the size, with one or two outputs.

    inputs: (C, h, w) of each.
    """

    batch: int
    inputs: tuple[tuple[int, int, int], ...]
    upsampled: tuple[bool, ...]
    out_channels: tuple[int, ...]
    height: int
    width: int
    activation: Activation

    def as_conv(self) -> ConvSpec:
        """The convolution over the concatenation, which the whole would be without its other properties."""
        channels = sum(C for C, _, _ in self.inputs)
        size = (self.batch, channels, sum(self.out_channels), self.height, self.width)
        return ConvSpec(*size, 1, 1, torch.float16, torch.float16)


@dataclass(frozen=True)
class Stem:
    """Pixels to the output of the first one or two convolutions. height, width: of the pixels."""

    batch: int
    height: int
    width: int
    channels: int
    point_channels: int
    activation: Activation


Work = ConvSpec | Pointwise | Stem


@dataclass(frozen=True)
class Layer:
    """One distinct piece of work of a network, and how often it occurs."""

    work: Work
    count: int

    @property
    def name(self) -> str:
        """A short description, unique within a network."""
        return describe(self.work)


def describe(work: Work) -> str:
    """A short description of a piece of work."""
    if isinstance(work, ConvSpec):
        extra = {"none": "", "before": " + shortcut", "after": ", then + shortcut"}[work.addend]
        stride = f" /{work.stride}" if work.stride > 1 else ""
        k = work.kernel_size
        end = "" if work.relu else ", linear"
        size = f"{work.height}x{work.width}"
        return f"{k}x{k}{stride} {work.in_channels}->{work.out_channels} at {size}{extra}{end}"
    if isinstance(work, Pointwise):
        inputs = "+".join(
            f"{C}{'up' if up else ''}" for (C, _, _), up in zip(work.inputs, work.upsampled, strict=True)
        )
        outputs = "+".join(map(str, work.out_channels))
        return f"1x1 {inputs}->{outputs} at {work.height}x{work.width}, own kernel"
    return f"stem 3->{work.channels}->{work.point_channels} at {work.height}x{work.width}, own kernel"


def flop(work: Work) -> float:
    """Multiplications and additions, two operations for each product."""
    if isinstance(work, Pointwise):
        work = work.as_conv()
    if isinstance(work, ConvSpec):
        return 2.0 * math.prod(work.output_shape) * work.in_channels * work.kernel_size**2
    pixels = work.batch * work.height * work.width / 4
    return 2.0 * pixels * (work.channels * 108 + work.channels * work.point_channels)


def least_bytes(work: Work) -> float:
    """Bytes of device memory if each input is read once and each output written once."""
    if isinstance(work, ConvSpec):
        moved = (
            math.prod(work.input_shape) * BYTES[work.in_type]
            + math.prod(work.weight_shape) * BYTES[work.in_type]
        )
        moved += math.prod(work.output_shape) * BYTES[work.out_type]
        if work.addend != "none":
            moved += math.prod(work.output_shape) * BYTES[work.addend_type]
        return moved
    if isinstance(work, Pointwise):
        read = sum(math.prod(shape) for shape in work.inputs)
        return 2.0 * work.batch * (read + sum(work.out_channels) * work.height * work.width)
    pixels = work.batch * work.height * work.width
    return pixels * 3 + pixels / 4 * (work.point_channels or work.channels) * 2


def distinct_layers(model: nn.Module, pixels_shape: tuple[int, int, int, int]) -> list[Layer]:
    """The layers of a fused network for pixels of a shape, those with most operations in total first.

    Runs a copy on the meta device, which computes shapes only.
    """
    counts: dict[Work, int] = {}

    def add(work: Work) -> None:
        counts[work] = counts.get(work, 0) + 1

    model = copy.deepcopy(model).to("meta")
    adding = {block.conv1 for block in model.modules() if isinstance(block, FusedRepBlock)}
    for module in model.modules():
        if isinstance(module, FusedConv):
            module.register_forward_pre_hook(functools.partial(_record_conv, add, module in adding))
        elif isinstance(module, PixelStem):
            module.register_forward_pre_hook(functools.partial(_record_stem, add))
        elif isinstance(module, PointwiseConv):
            _record_pointwise(module, add)
    model(torch.empty(pixels_shape, dtype=torch.uint8, device="meta").to(memory_format=torch.channels_last))
    layers = [Layer(work, count) for work, count in counts.items()]
    return sorted(layers, key=lambda layer: -flop(layer.work) * layer.count)


def _record_conv(
    add: Callable[[Work], None], adds_after: bool, conv: FusedConv, inputs: tuple[Tensor, ...]
) -> None:
    B, C, H, W = inputs[0].shape
    O, _, k, _ = conv.weight.shape  # noqa: E741
    addend: Addend = (
        "after" if adds_after else "before" if len(inputs) > 1 and inputs[1] is not None else "none"
    )
    relu = conv.activation == "relu"
    add(ConvSpec(B, C, O, H, W, k, conv.stride[0], torch.float16, torch.float16, relu, addend))


def _record_stem(add: Callable[[Work], None], stem: PixelStem, inputs: tuple[Tensor, ...]) -> None:
    B, _, H, W = inputs[0].shape
    points = 0 if stem.pointwise_bias is None else len(stem.pointwise_bias)
    add(Stem(B, H, W, len(stem.bias), points, stem.activation))


def _record_pointwise(module: PointwiseConv, add: Callable[[Work], None]) -> None:
    """Record the calls of `split`, which is no forward and takes no hook."""
    split = module.split

    def recorded(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = split(*inputs)
        B, _, H, W = outputs[0].shape
        shapes = tuple((x.shape[1], x.shape[2], x.shape[3]) for x in inputs)
        upsampled = tuple(map(bool, module.upsampled or (False,) * len(inputs)))
        add(Pointwise(B, shapes, upsampled, module.out_channels, H, W, module.activation))
        return outputs

    module.split = recorded  # type: ignore[method-assign]
