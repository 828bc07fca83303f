"""The Triton kernel of `pointwise`: a matrix product whose left side is gathered from up to five tensors.

Rows are output pixels, columns are output channels, and the summed dimension runs over the input channels in
blocks that never span two inputs, so that one pipelined loop handles all of them.
"""
# Triton ships no types.
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from damoyolo.cuda.kernels import Activation, launch, pixel_stride

MAX_INPUTS = 5
MAX_ELEMENTS = 2**31 - 1  # of a tensor, since offsets are 32-bit


class Tile(NamedTuple):
    """Work of one program: rows, columns, depth of a step; its warps; how many steps are loaded ahead."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_tile(rows: int, out_channels: int) -> Tile:
    """A fixed choice, so that a worker starts without tuning and all workers round alike."""
    block_n = min(128, max(16, triton.next_power_of_2(out_channels)))
    # Two programs of 128 rows share one of 132 multiprocessors; a small product is split into more programs.
    if triton.cdiv(rows, 128) * triton.cdiv(out_channels, block_n) >= 132:
        return Tile(128, block_n, 64, 8, 3)
    return Tile(64, min(64, block_n), 64, 4, 4)


@triton.jit(do_not_specialize=["rows", "height", "width"])
def pointwise_kernel(
    input_0,
    input_1,
    input_2,
    input_3,
    input_4,
    weight,
    bias,
    output_0,
    output_1,
    rows,
    height,
    width,
    NUM_INPUTS: tl.constexpr,
    # Of the five inputs: channels, elements from pixel to pixel, and whether to repeat pixels 2x2.
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    C3: tl.constexpr,
    C4: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    S3: tl.constexpr,
    S4: tl.constexpr,
    U0: tl.constexpr,
    U1: tl.constexpr,
    U2: tl.constexpr,
    U3: tl.constexpr,
    U4: tl.constexpr,
    # Channels of the two outputs, the second 0 where there is one.
    N0: tl.constexpr,
    N1: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = C0 + C1 + C2 + C3 + C4
    N: tl.constexpr = N0 + N1
    # Steps of the loop before each input, and in total.
    T1: tl.constexpr = (C0 + BLOCK_K - 1) // BLOCK_K
    T2: tl.constexpr = T1 + (C1 + BLOCK_K - 1) // BLOCK_K
    T3: tl.constexpr = T2 + (C2 + BLOCK_K - 1) // BLOCK_K
    T4: tl.constexpr = T3 + (C3 + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = T4 + (C4 + BLOCK_K - 1) // BLOCK_K
    HAS_TAIL: tl.constexpr = (C0 % BLOCK_K) + (C1 % BLOCK_K) + (C2 % BLOCK_K) + (C3 % BLOCK_K) + (
        C4 % BLOCK_K
    ) > 0

    # Programs of the same rows are consecutive: the second finds them in the cache.
    NUM_BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    m = (program // NUM_BLOCKS_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (program % NUM_BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # Rows and columns past the end read the last one instead of being masked; they are not stored.
    pixel = tl.minimum(m, rows - 1)
    half_pixel = pixel
    if U0 or U1 or U2 or U3 or U4:
        y = pixel // width  # of all images below one another; height is even
        half_pixel = (y // 2) * (width // 2) + (pixel % width) // 2
    channel = tl.minimum(n, N - 1) if N % BLOCK_N else n
    weight_pointers = weight + channel[None, :] * K + k[:, None]

    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(STEPS):
        source = input_0
        offset = (half_pixel if U0 else pixel) * S0
        channels = C0
        first_step = 0
        first_channel = 0
        if NUM_INPUTS > 1:
            here = step >= T1
            source = tl.where(here, input_1, source)
            offset = tl.where(here, (half_pixel if U1 else pixel) * S1, offset)
            channels = tl.where(here, C1, channels)
            first_step = tl.where(here, T1, first_step)
            first_channel = tl.where(here, C0, first_channel)
        if NUM_INPUTS > 2:
            here = step >= T2
            source = tl.where(here, input_2, source)
            offset = tl.where(here, (half_pixel if U2 else pixel) * S2, offset)
            channels = tl.where(here, C2, channels)
            first_step = tl.where(here, T2, first_step)
            first_channel = tl.where(here, C0 + C1, first_channel)
        if NUM_INPUTS > 3:
            here = step >= T3
            source = tl.where(here, input_3, source)
            offset = tl.where(here, (half_pixel if U3 else pixel) * S3, offset)
            channels = tl.where(here, C3, channels)
            first_step = tl.where(here, T3, first_step)
            first_channel = tl.where(here, C0 + C1 + C2, first_channel)
        if NUM_INPUTS > 4:
            here = step >= T4
            source = tl.where(here, input_4, source)
            offset = tl.where(here, (half_pixel if U4 else pixel) * S4, offset)
            channels = tl.where(here, C4, channels)
            first_step = tl.where(here, T4, first_step)
            first_channel = tl.where(here, C0 + C1 + C2 + C3, first_channel)
        done = (step - first_step) * BLOCK_K  # channels of this input that earlier steps summed
        if HAS_TAIL:
            inside = k < channels - done
            a = tl.load(source + done + offset[:, None] + k[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(weight_pointers + (first_channel + done), mask=inside[:, None], other=0.0)
        else:
            a = tl.load(source + done + offset[:, None] + k[None, :])
            b = tl.load(weight_pointers + (first_channel + done))
        sums = tl.dot(a, b, sums)

    sums += tl.load(bias + channel).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        sums = tl.maximum(sums, 0.0)
    elif ACTIVATION == "silu":
        sums = sums * tl.sigmoid(sums)
    result = sums.to(output_0.dtype.element_ty)
    row = m[:, None]
    column = n[None, :]
    if N1 == 0:
        tl.store(output_0 + row * N0 + column, result, mask=(row < rows) & (column < N0))
    else:
        tl.store(output_0 + row * N0 + column, result, mask=(row < rows) & (column < N0))
        in_second = (row < rows) & (column >= N0) & (column < N)
        tl.store(output_1 + row * N1 + (column - N0), result, mask=in_second)


def pointwise_conv(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    activation: Activation,
    upsampled: Sequence[bool],
    out_channels: Sequence[int],
    tile: Tile | None = None,
) -> tuple[Tensor, ...]:
    """`pointwise.pointwise_conv`; `tile` overrides the choice, for measuring.

    Raises:
        ValueError: shapes, types or layouts that the kernel does not take.
    """
    B, h, w = _check_and_measure(inputs, weight, upsampled, out_channels)
    first = inputs[0]
    rows = B * h * w
    channels = [x.shape[1] for x in inputs]
    strides = [pixel_stride(x) for x in inputs]
    outputs = [
        torch.empty((B, n, h, w), dtype=first.dtype, device=first.device, memory_format=torch.channels_last)
        for n in out_channels
    ]
    missing = MAX_INPUTS - len(inputs)
    tile = tile or choose_tile(rows, sum(out_channels))
    grid = (triton.cdiv(rows, tile.block_m) * triton.cdiv(sum(out_channels), tile.block_n),)
    launch(
        pointwise_kernel,
        grid,
        *inputs,
        *[first] * missing,
        weight,
        bias,
        outputs[0],
        outputs[-1],
        rows,
        h,
        w,
        len(inputs),
        *channels,
        *[0] * missing,
        *strides,
        *[0] * missing,
        *map(bool, upsampled),
        *[False] * missing,
        out_channels[0],
        sum(out_channels) - out_channels[0],
        activation,
        tile.block_m,
        tile.block_n,
        tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return tuple(outputs)


def _check_and_measure(
    inputs: Sequence[Tensor], weight: Tensor, upsampled: Sequence[bool], out_channels: Sequence[int]
) -> tuple[int, int, int]:
    """Batch size, height and width of the outputs.

    Raises:
        ValueError: see `pointwise_conv`.
    """
    first = inputs[0]
    B = first.shape[0]
    h, w = (side * 2 if upsampled[0] else side for side in first.shape[2:])
    rows = B * h * w
    channels = [x.shape[1] for x in inputs]
    for x, twice in zip(inputs, upsampled, strict=True):
        size_hw = tuple(side * 2 for side in x.shape[2:]) if twice else tuple(x.shape[2:])
        if x.shape[0] != B or size_hw != (h, w) or x.shape[1] % 8 or x.dtype != first.dtype:
            raise ValueError(
                f"an input is {tuple(x.shape)} in {x.dtype}, upsampled: {twice}; expected is a batch of {B}, "
                f"{h}x{w} pixels once upsampled, channels in eights, {first.dtype} like the first input"
            )
    if len(inputs) > MAX_INPUTS or len(out_channels) > 2:
        raise ValueError(
            f"{len(inputs)} inputs, {len(out_channels)} outputs; the most are {MAX_INPUTS} and 2"
        )
    shape = (sum(out_channels), sum(channels))
    if tuple(weight.shape) != shape or weight.dtype != first.dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight is {tuple(weight.shape)} in {weight.dtype} with strides {weight.stride()}; "
            f"expected is {shape} in {first.dtype}, contiguous"
        )
    strides = [pixel_stride(x) for x in inputs]
    if rows * max(*strides, *out_channels) > MAX_ELEMENTS:
        raise ValueError(
            f"{rows} pixels of up to {max(*strides, *out_channels)} elements exceed 32-bit offsets"
        )
    return B, h, w
