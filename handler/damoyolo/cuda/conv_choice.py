"""Choose for each convolution between cuDNN and the kernel of `kernels.conv`, by timing both.

The choice is made where cuDNN makes its own: while a network is warmed up for a capture
(`graphs.cudnn_benchmark`). Elsewhere, and for shapes that the kernel does not take, cuDNN runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from damoyolo.cuda.kernels.conv import runs_fused_conv

logger = logging.getLogger(__name__)

WARM_UP_CALLS = 3
TIMED_CALLS = 10
ROUNDS = 3
Call = Callable[[], Tensor]

# What was chosen in this process: of each shape the name of a tile, or "cudnn".
choices: dict[tuple[Any, ...], str] = {}


def fastest_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    relu: bool,
    addend: Tensor | None,
    add_after: bool,
    cudnn: Call,
) -> Tensor:
    """A convolution as `kernels.conv.fused_conv_reference` defines it, in the fastest way for its shape.

    cudnn: a call with the same result.
    """
    if x.dtype not in (torch.float16, torch.bfloat16) or not runs_fused_conv(x.device):
        return cudnn()
    key = (
        x.device,
        x.dtype,
        tuple(x.shape),
        tuple(weight.shape),
        stride,
        relu,
        addend is not None,
        add_after,
    )
    chosen = choices.get(key)
    if chosen is None:
        if not torch.backends.cudnn.benchmark or torch.cuda.is_current_stream_capturing():
            return cudnn()
    elif chosen == "cudnn":
        return cudnn()
    calls = _kernel_calls(x, weight, bias, stride, relu, addend, add_after)
    if chosen is None:
        chosen = choices[key] = _fastest({"cudnn": cudnn} | calls)
    return calls[chosen]() if chosen in calls else cudnn()


def _kernel_calls(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    relu: bool,
    addend: Tensor | None,
    add_after: bool,
) -> dict[str, Call]:
    """A call of the kernel for each tile that may be the fastest, by name."""
    from damoyolo.cuda.kernels.conv_gluon import Tile, candidate_tiles, fused_conv

    if x.shape[2] % stride or x.shape[3] % stride or weight.shape[2] not in (1, 3):
        return {}

    def call(tile: Tile) -> Call:
        return lambda: fused_conv(
            x, weight, bias, stride, relu, addend=addend, add_after=add_after, tile=tile
        )

    tiles = candidate_tiles(weight.shape[1], weight.shape[0], x.element_size())
    return {"x".join(map(str, tile)): call(tile) for tile in tiles}


def _fastest(calls: Mapping[str, Call]) -> str:
    """The name of the fastest call; one that fails is left out."""
    stream = torch.cuda.current_stream()
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, call in calls.items():
        try:
            for _ in range(WARM_UP_CALLS):
                call()
            stream.synchronize()
            graphs[name] = _sequence(call)
        except Exception as error:  # a tile that this compiler or chip refuses; cuDNN remains
            if name == "cudnn":
                raise
            logger.debug("convolution tile %s is left out: %s", name, error)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            start, end = _event(), _event()
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            samples[name].append(start.elapsed_time(end))
    return min(samples, key=lambda name: min(samples[name]))


def _sequence(call: Call) -> torch.cuda.CUDAGraph:
    """Several captured calls, of which none waits for its launch.

    Without `torch.cuda.graph`, which collects garbage and empties the cache at each capture.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        for _ in range(TIMED_CALLS):
            call()
    finally:
        graph.capture_end()
    return graph


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
