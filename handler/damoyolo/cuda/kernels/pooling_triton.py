"""The Triton kernels of `pooling`: maxima along the rows, then maxima of those along the columns.

The maximum of a square is the maximum along a column of maxima along rows: 40 reads per pixel instead of 169.
"""
# Triton ships no types.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from damoyolo.cuda.kernels import launch, pixel_stride

BLOCK_PIXELS, BLOCK_CHANNELS = 32, 64


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)  # as torch does


@triton.jit
def max_along_rows_kernel(
    x,  # (pixels, C), STRIDE elements from pixel to pixel
    along_rows,  # (pixels, 3C): maxima over 5, 9 and 13 pixels of the row
    pyramid,  # (pixels, 4C), of which the first C are written
    pixels,
    width,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    inside = (pixel < pixels) & (channel < C)
    column = pixel % width
    pointers = x + pixel * STRIDE + channel
    centre = tl.load(pointers, mask=inside)
    tl.store(pyramid + pixel * (4 * C) + channel, centre, mask=inside)
    maxima = centre
    for distance in tl.static_range(1, 7):
        left = tl.load(pointers - distance * STRIDE, mask=inside & (column >= distance), other=float("-inf"))
        in_row = column + distance < width
        right = tl.load(pointers + distance * STRIDE, mask=inside & in_row, other=float("-inf"))
        maxima = maximum(maxima, maximum(left, right))
        if distance % 2 == 0:
            slot = (distance // 2 - 1) * C
            tl.store(along_rows + pixel * (3 * C) + slot + channel, maxima, mask=inside)


@triton.jit
def max_along_columns_kernel(
    along_rows,  # (pixels, 3C)
    pyramid,  # (pixels, 4C), of which the last 3C are written
    pixels,
    height,
    width,
    C: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    slot = tl.program_id(2)  # 0, 1, 2: windows of 5, 9, 13
    inside = (pixel < pixels) & (channel < C)
    row = (pixel // width) % height
    pointers = along_rows + pixel * (3 * C) + slot * C + channel
    maxima = tl.load(pointers, mask=inside)
    row_stride = width * (3 * C)
    for distance in tl.static_range(1, 7):  # unrolled: Triton 3.6 computes maxima of bf16 in float32
        wanted = inside & (distance <= 2 * slot + 2)
        in_map = row >= distance
        above = tl.load(pointers - distance * row_stride, mask=wanted & in_map, other=float("-inf"))
        in_map = row + distance < height
        below = tl.load(pointers + distance * row_stride, mask=wanted & in_map, other=float("-inf"))
        maxima = maximum(maxima, maximum(above, below))
    tl.store(pyramid + pixel * (4 * C) + (slot + 1) * C + channel, maxima, mask=inside)


def pyramid_max_pool(x: Tensor) -> Tensor:
    """`pooling.pyramid_max_pool`."""
    B, C, h, w = x.shape
    pixels = B * h * w
    pyramid = torch.empty((B, 4 * C, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    along_rows = torch.empty((pixels, 3 * C), dtype=x.dtype, device=x.device)
    blocks = (triton.cdiv(pixels, BLOCK_PIXELS), triton.cdiv(C, BLOCK_CHANNELS))
    block = (BLOCK_PIXELS, BLOCK_CHANNELS)
    launch(max_along_rows_kernel, blocks, x, along_rows, pyramid, pixels, w, C, pixel_stride(x), *block)
    launch(max_along_columns_kernel, (*blocks, 3), along_rows, pyramid, pixels, h, w, C, *block)
    return pyramid
