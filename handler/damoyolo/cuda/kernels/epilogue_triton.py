"""The Triton kernel of `epilogue`: each program processes a contiguous range of memory."""
# Triton ships no types.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from damoyolo.cuda.kernels import Activation, launch

BLOCK_SIZE = 2048  # elements per program: 16 for each of 128 threads, two 16-byte loads


@triton.jit
def add_bias_and_activate_kernel(
    x,
    bias,
    addend,
    element_count,
    CHANNELS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # The start has 64 bits, since a batch may have more than 2**31 elements; the offsets from it have 32, so
    # that the division by the channels, the only expensive operation, is one of 32 bits.
    start = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    within = tl.arange(0, BLOCK_SIZE)
    inside = start + within < element_count
    channel = ((start % CHANNELS).to(tl.int32) + within) % CHANNELS
    y = tl.load(x + start + within, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(bias + channel).to(tl.float32)
    if HAS_ADDEND:
        y += tl.load(addend + start + within, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    tl.store(x + start + within, y.to(x.dtype.element_ty), mask=inside)


def add_bias_and_activate(x: Tensor, bias: Tensor, activation: Activation, addend: Tensor | None) -> Tensor:
    """`epilogue.add_bias_and_activate`.

    Raises:
        ValueError: the addend is of another shape or type.
    """
    if addend is not None and (addend.shape != x.shape or addend.dtype != x.dtype):
        raise ValueError(
            f"addend is {tuple(addend.shape)} in {addend.dtype}; expected is {tuple(x.shape)} in {x.dtype}"
        )
    x = x.contiguous(memory_format=torch.channels_last)
    addend = None if addend is None else addend.contiguous(memory_format=torch.channels_last)
    grid = (triton.cdiv(x.numel(), BLOCK_SIZE),)
    launch(
        add_bias_and_activate_kernel,
        grid,
        x,
        bias,
        x if addend is None else addend,
        x.numel(),
        CHANNELS=x.shape[1],
        HAS_ADDEND=addend is not None,
        ACTIVATION=activation,
        BLOCK_SIZE=BLOCK_SIZE,
        num_warps=4,
    )
    return x
