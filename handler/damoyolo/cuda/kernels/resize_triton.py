"""The Triton kernel of `resize`: one launch for a whole batch of images of any sizes and layouts."""
# Triton ships no types.
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from damoyolo.cuda.kernels import launch
from damoyolo.orientation import PixelTable

BLOCK_PIXELS = 512


@triton.jit
def _resize_kernel(
    table_ptr,  # (B, 6) int64, rows as PixelTable
    out_ptr,  # (B, OUT_HEIGHT, OUT_WIDTH, 3) uint8
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # output pixels of one image, row by row
    image = tl.program_id(1)
    inside = index < OUT_HEIGHT * OUT_WIDTH
    y = index // OUT_WIDTH
    x = index % OUT_WIDTH

    entry = table_ptr + image * 6
    source = tl.load(entry).to(tl.pointer_type(tl.uint8))
    height = tl.load(entry + 1).to(tl.int32)
    width = tl.load(entry + 2).to(tl.int32)
    row_stride = tl.load(entry + 3)
    column_stride = tl.load(entry + 4)
    channel_stride = tl.load(entry + 5)

    # (y + 1/2) * height / OUT_HEIGHT - 1/2 as a fraction of integers: exact, so that an image of the same
    # size has weights of exactly 0.
    y_numerator = tl.maximum((2 * y + 1) * height - OUT_HEIGHT, 0)
    x_numerator = tl.maximum((2 * x + 1) * width - OUT_WIDTH, 0)
    top = y_numerator // (2 * OUT_HEIGHT)
    left = x_numerator // (2 * OUT_WIDTH)
    y_weight = (y_numerator % (2 * OUT_HEIGHT)).to(tl.float32) * (0.5 / OUT_HEIGHT)
    x_weight = (x_numerator % (2 * OUT_WIDTH)).to(tl.float32) * (0.5 / OUT_WIDTH)
    bottom = tl.minimum(top + 1, height - 1)
    right = tl.minimum(left + 1, width - 1)

    top_row = top * row_stride
    bottom_row = bottom * row_stride
    left_column = left * column_stride
    right_column = right * column_stride
    target = out_ptr + image.to(tl.int64) * (OUT_HEIGHT * OUT_WIDTH * 3) + index * 3
    for channel in tl.static_range(3):
        plane = source + channel * channel_stride
        top_left = tl.load(plane + (top_row + left_column), mask=inside, other=0).to(tl.float32)
        top_right = tl.load(plane + (top_row + right_column), mask=inside, other=0).to(tl.float32)
        bottom_left = tl.load(plane + (bottom_row + left_column), mask=inside, other=0).to(tl.float32)
        bottom_right = tl.load(plane + (bottom_row + right_column), mask=inside, other=0).to(tl.float32)
        upper = top_left + x_weight * (top_right - top_left)
        lower = bottom_left + x_weight * (bottom_right - bottom_left)
        level = upper + y_weight * (lower - upper)
        tl.store(target + channel, (level + 0.5).to(tl.int32).to(tl.uint8), mask=inside)


def resize_images(table: Sequence[PixelTable], out: Tensor) -> None:
    """See `resize.resize_images`; `table` has a row for each image of `out`."""
    B, height, width, _ = out.shape
    if len(table) != B or out.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(f"{len(table)} images do not fit {out.dtype} {tuple(out.shape)}, {out.stride()}")
    # PyTorch's allocator of pinned memory does not reuse it before the copy has read it.
    rows = torch.tensor(table, dtype=torch.int64, pin_memory=out.is_cuda).to(out.device, non_blocking=True)
    grid = (triton.cdiv(height * width, BLOCK_PIXELS), B)
    launch(_resize_kernel, grid, rows, out, OUT_HEIGHT=height, OUT_WIDTH=width, BLOCK=BLOCK_PIXELS)
