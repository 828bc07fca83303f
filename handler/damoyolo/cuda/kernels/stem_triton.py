"""The Triton kernel of `stem`: matrix products of patches of raw pixels, the first result kept on chip.

A row of a patch is 18 consecutive bytes (6 pixels of 3 colours). For every second pixel of the output it
starts at a multiple of 4 bytes, for the others 2 bytes later. Both kinds of patches are read as 6 rows of 5
words of 4 bytes, of which the 2 extra bytes have weight zero. The first, second, third and fourth bytes of
the words form four matrices, whose products add up to the convolution.
"""
# Triton ships no types.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from damoyolo.cuda.kernels import Activation, launch

BLOCK_X, BLOCK_Y = 32, 2  # of one matrix product: pixels of one kind, and rows
NUM_WARPS = 4
# Rows of the output per program, which loads the weights once, and Triton's stages; SMALL where LARGE would
# leave fewer programs than MANY_PROGRAMS.
LARGE, SMALL = (32, 1), (8, 3)
MANY_PROGRAMS = 528  # four for each multiprocessor of an H100
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
OUTSIDE = tl.constexpr(-(2**30))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def byte_as_float(words, INDEX: tl.constexpr, DTYPE: tl.constexpr):
    # A byte or-ed into the mantissa of 1024.0 is exactly 1024 + byte; cheaper than a conversion.
    bits = ((words >> (8 * INDEX)) & 0xFF) | 0x6400
    return (bits.to(tl.int16).to(tl.float16, bitcast=True) - 1024.0).to(DTYPE)


@triton.jit
def bytes_plus_1024(words):
    """The four bytes of each word, each plus 1024, in float16: exact, and one instruction for each byte."""
    if INTERPRETED:
        return (
            byte_as_float(words, 0, tl.float16) + 1024.0,
            byte_as_float(words, 1, tl.float16) + 1024.0,
            byte_as_float(words, 2, tl.float16) + 1024.0,
            byte_as_float(words, 3, tl.float16) + 1024.0,
        )
    else:
        # A byte or-ed into the mantissa of 1024.0. Two words at a time: the same byte of both, then the rest.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t0, t1, t2, t3;
            prmt.b32 t0, $4, $5, 0x4400;
            prmt.b32 t1, $4, $5, 0x5511;
            prmt.b32 t2, $4, $5, 0x6622;
            prmt.b32 t3, $4, $5, 0x7733;
            lop3.b32 $0, t0, 0x00FF00FF, 0x64006400, 0xEA;
            lop3.b32 $1, t1, 0x00FF00FF, 0x64006400, 0xEA;
            lop3.b32 $2, t2, 0x00FF00FF, 0x64006400, 0xEA;
            lop3.b32 $3, t3, 0x00FF00FF, 0x64006400, 0xEA;
            }
            """,
            "=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def load_weight(stem_weight, odd, INDEX: tl.constexpr, C1: tl.constexpr, BLOCK_C1: tl.constexpr):
    """The weight of byte INDEX of each of the 32 words of a patch: (32, BLOCK_C1)."""
    word = tl.arange(0, 32)
    byte = (word % 5) * 4 + INDEX - 2 * (1 - odd)  # of the 18 in a row
    channel = tl.arange(0, BLOCK_C1)
    exists = ((word < 30) & (byte >= 0) & (byte < 18))[:, None] & (channel < C1)[None, :]
    tap = (word // 5) * 18 + byte
    return tl.load(stem_weight + channel[None, :] * 108 + tap[:, None], mask=exists, other=0.0)


@triton.jit
def focus_stem_kernel(
    words,  # (B, H, W * 3 / 4) int32
    stem_weight,  # (C1, 6, 6, 3)
    stem_bias,
    point_weight,  # (C2, C1)
    point_bias,
    output,  # (B, H/2, W/2, C2 or C1)
    height,
    width,
    out_height,
    out_width,
    C1: tl.constexpr,
    C2: tl.constexpr,  # 0: no second convolution
    ACTIVATION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C1: tl.constexpr,
    BLOCK_C2: tl.constexpr,
    SHIFTED: tl.constexpr,  # bytes are multiplied as 1024 + byte, for which the bias makes up
):
    dtype: tl.constexpr = output.dtype.element_ty
    odd = tl.program_id(0) % 2
    image = tl.program_id(2)
    m = tl.arange(0, BLOCK_X * BLOCK_Y)
    half_x = (tl.program_id(0) // 2) * BLOCK_X + m % BLOCK_X
    x = 2 * half_x + odd
    words_of_row = width * 3 // 4

    # A patch starts two pixels above and left of the 2x2 pixels of its output. Its words are numbered from
    # the first of the image; those left and right of the image get a large negative number.
    word = tl.arange(0, 32)
    row = (2 * (m // BLOCK_X))[:, None] + (word // 5 - 2)[None, :]
    column = (half_x * 3 - 2 * (1 - odd))[:, None] + (word % 5)[None, :]
    in_columns = (column >= 0) & (column < words_of_row) & (word < 30)[None, :]
    first_index = tl.where(in_columns, row * words_of_row + column, OUTSIDE)
    words_of_image = (height * words_of_row).to(tl.uint32)
    words += image * height * words_of_row

    weight_0 = load_weight(stem_weight, odd, 0, C1, BLOCK_C1)
    weight_1 = load_weight(stem_weight, odd, 1, C1, BLOCK_C1)
    weight_2 = load_weight(stem_weight, odd, 2, C1, BLOCK_C1)
    weight_3 = load_weight(stem_weight, odd, 3, C1, BLOCK_C1)
    c1 = tl.arange(0, BLOCK_C1)
    bias_1 = tl.load(stem_bias + c1, mask=c1 < C1, other=0.0).to(tl.float32)
    if SHIFTED:
        total = tl.sum(weight_0.to(tl.float32), axis=0) + tl.sum(weight_1.to(tl.float32), axis=0)
        total += tl.sum(weight_2.to(tl.float32), axis=0) + tl.sum(weight_3.to(tl.float32), axis=0)
        bias_1 -= 1024 * total
    if C2 > 0:
        c2 = tl.arange(0, BLOCK_C2)
        has_point = (c1 < C1)[:, None] & (c2 < C2)[None, :]
        second_weight = tl.load(point_weight + c2[None, :] * C1 + c1[:, None], mask=has_point, other=0.0)
        bias_2 = tl.load(point_bias + c2, mask=c2 < C2, other=0.0).to(tl.float32)

    first_y = tl.program_id(1) * BLOCK_ROWS
    for step in range(0, BLOCK_ROWS, BLOCK_Y):
        y = first_y + step + m // BLOCK_X
        index = first_index + 2 * (first_y + step) * words_of_row
        inside = index.to(tl.uint32, bitcast=True) < words_of_image  # and not negative
        patch = tl.load(words + index, mask=inside, other=0)
        if SHIFTED:
            b0, b1, b2, b3 = bytes_plus_1024(patch)
            sums = tl.dot(b0, weight_0)
            sums = tl.dot(b1, weight_1, sums)
            sums = tl.dot(b2, weight_2, sums)
            sums = tl.dot(b3, weight_3, sums)
        else:
            sums = tl.dot(byte_as_float(patch, 0, dtype), weight_0)
            sums = tl.dot(byte_as_float(patch, 1, dtype), weight_1, sums)
            sums = tl.dot(byte_as_float(patch, 2, dtype), weight_2, sums)
            sums = tl.dot(byte_as_float(patch, 3, dtype), weight_3, sums)
        # Rounded between the two convolutions, as if it were stored in between.
        result = activated(sums + bias_1[None, :], ACTIVATION).to(dtype)
        exists = ((x < out_width) & (y < out_height))[:, None]
        pixel = ((image * out_height + y) * out_width + x)[:, None]
        if C2 > 0:
            sums = tl.dot(result, second_weight)
            result = activated(sums + bias_2[None, :], ACTIVATION).to(dtype)
            tl.store(output + pixel * C2 + c2[None, :], result, mask=exists & (c2 < C2)[None, :])
        else:
            tl.store(output + pixel * C1 + c1[None, :], result, mask=exists & (c1 < C1)[None, :])


def focus_stem(
    pixels: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor,
    point_weight: Tensor | None,
    point_bias: Tensor | None,
    dtype: torch.dtype,
    activation: Activation = "relu",
) -> Tensor:
    """`stem.focus_stem`.

    Raises:
        ValueError: shapes or types that the kernel does not take.
    """
    B, colours, H, W = pixels.shape
    C1 = stem_weight.shape[0]
    if pixels.dtype != torch.uint8 or colours != 3 or H % 2 or W % 4:
        raise ValueError(
            f"pixels are {tuple(pixels.shape)} in {pixels.dtype}; expected is (B, 3, H, W) in uint8, "
            "H a multiple of 2 and W of 4"
        )
    if tuple(stem_weight.shape) != (C1, 3, 6, 6):
        raise ValueError(f"stem_weight is {tuple(stem_weight.shape)}; expected is (channels, 3, 6, 6)")
    if point_weight is not None and point_weight.shape[1:] != (C1,):
        raise ValueError(f"point_weight is {tuple(point_weight.shape)}; expected is (channels, {C1})")
    C2 = 0 if point_weight is None else point_weight.shape[0]

    # B,3,H,W -> B,H,W*3 bytes -> B,H,W*3/4 words; a view where the pixels are channels_last.
    words = pixels.permute(0, 2, 3, 1).contiguous().view(B, H, W * 3).view(torch.int32)
    stem_weight = stem_weight.to(dtype).permute(0, 2, 3, 1).contiguous()  # C1,3,6,6 -> C1,6,6,3
    if point_weight is not None:
        point_weight = point_weight.to(dtype).contiguous()
    output = torch.empty(
        (B, C2 or C1, H // 2, W // 2), dtype=dtype, device=pixels.device, memory_format=torch.channels_last
    )
    columns = 2 * triton.cdiv(W // 4, BLOCK_X)
    many = columns * triton.cdiv(H // 2, LARGE[0]) * B >= MANY_PROGRAMS
    block_rows, num_stages = LARGE if many else SMALL
    grid = (columns, triton.cdiv(H // 2, block_rows), B)
    launch(
        focus_stem_kernel,
        grid,
        words,
        stem_weight,
        stem_bias,
        stem_weight if point_weight is None else point_weight,  # one of the pair is not read
        stem_bias if point_bias is None else point_bias,
        output,
        *(H, W, H // 2, W // 2, C1, C2),
        activation,
        *(BLOCK_X, BLOCK_Y, block_rows),
        *(max(16, triton.next_power_of_2(channels)) for channels in (C1, C2)),
        dtype == torch.float16,
        num_warps=NUM_WARPS,
        num_stages=num_stages,
    )
    return output
