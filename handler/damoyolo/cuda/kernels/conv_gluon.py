"""The kernel of `conv`, in Gluon, Triton's language for explicit shared memory, for compute capability 9.0.

An implicit matrix product: rows are the pixels of a box of the output, columns output channels, and the
summed dimension runs over the taps and input channels. One warp lets the copy engine fetch boxes of pixels
and blocks of weights into a ring of buffers; the engine also fills in the zeros around an image. The other
warps multiply straight from shared memory.
"""
# Triton ships no types.
# mypy: ignore-errors

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

GLUON_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.int8: gl.int8}


class Tile(NamedTuple):
    """Work of one program: rows, columns, depth of a step; steps ahead; warps that multiply; register limit.

    registers: of a thread, 0 for no limit; a limit lets two programs share a multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    num_warps: int
    registers: int = 0


DEFAULT_TILE = Tile(128, 128, 64, 4, 8)


@gluon.jit
def fetch(
    x, weight, addend, x_ring, weight_ring, addend_buffer, ready, empty, addend_ready,
    image, y0, x0, n0,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, C: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """The warp that feeds the ring."""
    BLOCKS: gl.constexpr = C // BLOCK_K
    if ADD:
        mbarrier.expect(addend_ready, addend.block_type.nbytes)
        tma.async_copy_global_to_shared(addend, [image, y0, x0, n0], addend_ready, addend_buffer)
    for step in range(KERNEL * KERNEL * BLOCKS):
        slot = step % STAGES
        tap = step // BLOCKS
        c = (step % BLOCKS) * BLOCK_K
        dy = tap // KERNEL
        dx = tap % KERNEL
        mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)  # the first round does not wait
        mbarrier.expect(ready.index(slot), x.block_type.nbytes + weight.block_type.nbytes)
        if STRIDE == 1:
            place = [image, y0 + dy - KERNEL // 2, x0 + dx - KERNEL // 2, c]
        elif KERNEL == 3:
            # Row 2 * y + dy - 1 is row (y + (dy + 1) // 2 - 1) of those with parity (dy + 1) % 2.
            place = [
                image, y0 + (dy + 1) // 2 - 1, (dy + 1) % 2, x0 + (dx + 1) // 2 - 1, (dx + 1) % 2 * C + c
            ]  # fmt: skip
        else:
            place = [image, y0, 0, x0, c]
        tma.async_copy_global_to_shared(x, place, ready.index(slot), x_ring.index(slot))
        tma.async_copy_global_to_shared(weight, [n0, tap * C + c], ready.index(slot), weight_ring.index(slot))


@gluon.jit
def multiply(
    out, scale, bias, addend_factor, x_ring, weight_ring, out_buffer, addend_buffer,
    ready, empty, addend_ready, image, y0, x0, n0,
    STEPS: gl.constexpr, N: gl.constexpr, SCALED: gl.constexpr, ADD: gl.constexpr, AFTER: gl.constexpr,
    RELU: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The warps that multiply what the ring holds, and write the result."""
    INT8: gl.constexpr = x_ring.dtype == gl.int8
    # Triton has no product of 256 columns in INT8.
    COLUMNS: gl.constexpr = min(BLOCK_N, 128) if INT8 else BLOCK_N
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 32 if INT8 else 16]
    )
    sums = gl.zeros((BLOCK_M, BLOCK_N), gl.int32 if INT8 else gl.float32, layout=layout)
    for step in range(STEPS):
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        pixels = x_ring.index(slot).reshape([BLOCK_M, BLOCK_K])
        sums = warpgroup_mma(pixels, weight_ring.index(slot).permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_wait(num_outstanding=1, deps=[sums])
        # The product of the step before has ended, and with it the use of its buffers.
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=step > 0)
    sums = warpgroup_mma_wait(num_outstanding=0, deps=[sums])

    n = gl.minimum(n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout)), N - 1)
    y = sums.to(gl.float32)
    if SCALED:
        y = y * gl.expand_dims(gl.load(scale + n).to(gl.float32), 0)
    y = y + gl.expand_dims(gl.load(bias + n).to(gl.float32), 0)
    if ADD:
        mbarrier.wait(addend_ready, 0)
        added = addend_buffer.reshape([BLOCK_M, BLOCK_N]).load(layout).to(gl.float32) * addend_factor
        if not AFTER:
            y = y + added
    if RELU:
        y = gl.maximum(y, 0.0)
    if ADD and AFTER:
        y = y + added
    if out.dtype == gl.int8:
        y = gl.minimum(gl.maximum(gl.floor(y + 0.5), -128.0), 127.0)
    out_buffer.reshape([BLOCK_M, BLOCK_N]).store(y.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [image, y0, x0, n0], out_buffer)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["addend_factor"])
def conv_kernel(
    x,  # (B, H, W, C), for stride 2 as (B, H/2, 2, W/2, 2 * C)
    weight,  # (N, KERNEL * KERNEL * C)
    addend,  # (B, OUT_HEIGHT, OUT_WIDTH, N)
    out,  # the same
    scale,
    bias,
    addend_factor,
    OUT_HEIGHT: gl.constexpr,
    OUT_WIDTH: gl.constexpr,
    C: gl.constexpr,
    N: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    SCALED: gl.constexpr,
    ADD: gl.constexpr,
    AFTER: gl.constexpr,
    RELU: gl.constexpr,
    BOX_IMAGES: gl.constexpr,
    BOX_HEIGHT: gl.constexpr,
    BOX_WIDTH: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    BLOCK_M: gl.constexpr = BOX_IMAGES * BOX_HEIGHT * BOX_WIDTH
    BLOCKS_N: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    BLOCKS_X: gl.constexpr = (OUT_WIDTH + BOX_WIDTH - 1) // BOX_WIDTH
    BLOCKS_Y: gl.constexpr = (OUT_HEIGHT + BOX_HEIGHT - 1) // BOX_HEIGHT
    # Programs of the same pixels are consecutive: the second finds them in the cache.
    n0 = gl.program_id(0) % BLOCKS_N * BLOCK_N
    box = gl.program_id(0) // BLOCKS_N
    x0 = box % BLOCKS_X * BOX_WIDTH
    y0 = box // BLOCKS_X % BLOCKS_Y * BOX_HEIGHT
    image = box // (BLOCKS_X * BLOCKS_Y) * BOX_IMAGES

    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)  # noqa: RUF005
    weight_shape: gl.constexpr = [STAGES] + weight.block_type.shape  # noqa: RUF005
    weight_ring = gl.allocate_shared_memory(weight.dtype, weight_shape, weight.layout)
    out_buffer = gl.allocate_shared_memory(out.dtype, out.block_type.shape, out.layout)
    if ADD and addend.dtype != out.dtype:
        addend_buffer = gl.allocate_shared_memory(addend.dtype, addend.block_type.shape, addend.layout)
    else:
        addend_buffer = out_buffer  # read before it is overwritten
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    addend_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    mbarrier.init(addend_ready, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    out, scale, bias, addend_factor, x_ring, weight_ring, out_buffer, addend_buffer,
                    ready, empty, addend_ready, image, y0, x0, n0,
                    KERNEL * KERNEL * (C // BLOCK_K), N, SCALED, ADD, AFTER, RELU,
                    BLOCK_M, BLOCK_N, BLOCK_K, STAGES, num_warps,
                ),
            ),
            (
                fetch,
                (
                    x, weight, addend, x_ring, weight_ring, addend_buffer, ready, empty, addend_ready,
                    image, y0, x0, n0, KERNEL, STRIDE, C, BLOCK_K, STAGES, ADD,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip


@functools.cache
def choose_box(block_m: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """Images, rows and columns of a box of `block_m` pixels that covers the output with the fewest boxes.

    Powers of two; of equals the one with the widest rows.
    """
    boxes = [
        (images, rows, block_m // images // rows)
        for images in (1, 2, 4, 8, 16, 32, 64, 128)
        for rows in (1, 2, 4, 8, 16, 32)
        if images * rows <= block_m and block_m // images // rows <= 64
    ]

    def cost(box: tuple[int, int, int]) -> tuple[int, int]:
        images, rows, columns = box
        count = triton.cdiv(batch, images) * triton.cdiv(height, rows) * triton.cdiv(width, columns)
        return count, images

    return min(boxes, key=cost)


def described(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """What the copy engine needs to know of a tensor that is read or written in blocks."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), GLUON_TYPES[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, list(block), layout)


def candidate_tiles(in_channels: int, out_channels: int, item_bytes: int) -> list[Tile]:
    """Tiles worth timing for a convolution; none where the kernel does not take its channels.

    item_bytes: of an element of input and output.
    """
    depths = [depth for depth in (64 * 2 // item_bytes, 64, 32) if in_channels % depth == 0]
    if not depths or out_channels * item_bytes % 16:
        return []
    depth = depths[0]
    column_counts = [128 if out_channels > 64 else 64]
    if out_channels > 128 and -out_channels % 256 < 128:
        column_counts.append(256)
    if -out_channels % 64 < -out_channels % 128:
        column_counts.append(64)
    tiles = []
    for columns in dict.fromkeys(column_counts):
        for rows, warps, registers in ((128, 8, 0), (256, 8, 0), (128, 4, 128), (64, 4, 128)):
            limit = 112 * 1024 if registers else 226 * 1024
            stages = (limit - rows * columns * item_bytes) // ((rows + columns) * depth * item_bytes)
            if stages >= 2 and rows * columns <= 256 * 128 // (8 // warps):
                tiles.append(Tile(rows, columns, depth, min(stages, 8), warps, registers))
    return tiles


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    relu: bool = True,
    scale: Tensor | None = None,
    addend: Tensor | None = None,
    addend_factor: float = 1.0,
    add_after: bool = False,
    out_dtype: torch.dtype | None = None,
    tile: Tile = DEFAULT_TILE,
) -> Tensor:
    """See `conv.fused_conv_reference`; sums of fp16 in float32.

    Raises:
        ValueError: shapes that the kernel does not take with this tile.
    """
    B, C, H, W = x.shape
    N, _, kernel, _ = weight.shape
    if C % tile.block_k or H % stride or W % stride or N * x.element_size() % 16:
        raise ValueError(
            f"input is {tuple(x.shape)}, weight {tuple(weight.shape)}, stride {stride}; expected are channels"
            f" in {tile.block_k}s, sides in multiples of the stride, output pixels of whole 16 bytes"
        )
    out_size_hw = H // stride, W // stride
    out = torch.empty(
        (B, N, *out_size_hw), dtype=out_dtype or x.dtype, device=x.device, memory_format=torch.channels_last
    )
    box = choose_box(tile.block_m, B, *out_size_hw)
    pixels = x.permute(0, 2, 3, 1)  # B,C,H,W -> B,H,W,C
    if stride == 1:
        x_view = described(pixels, (*box, tile.block_k))
    else:
        halved = pixels.view(B, H // 2, 2, W // 2, 2 * C)
        x_view = described(halved, (box[0], box[1], 1, box[2], tile.block_k))
    weight_view = described(weight.permute(0, 2, 3, 1).reshape(N, -1), (tile.block_n, tile.block_k))
    out_view = described(out.permute(0, 2, 3, 1), (*box, tile.block_n))
    addend_view = out_view if addend is None else described(addend.permute(0, 2, 3, 1), (*box, tile.block_n))
    boxes = triton.cdiv(B, box[0]) * triton.cdiv(out_size_hw[0], box[1]) * triton.cdiv(out_size_hw[1], box[2])
    options = {"maxnreg": tile.registers} if tile.registers else {}
    with torch.cuda.device(x.device):
        conv_kernel[(boxes * triton.cdiv(N, tile.block_n),)](
            x_view, weight_view, addend_view, out_view, bias if scale is None else scale, bias, addend_factor,
            *out_size_hw, C, N, kernel, stride, scale is not None, addend is not None, add_after, relu,
            *box, tile.block_n, tile.block_k, tile.stages, num_warps=tile.num_warps, **options,
        )  # fmt: skip
    return out
