"""Capture CUDA graphs: warm up on a side stream, then record what is enqueued.

A graph holds the addresses of weights and buffers, not the tensors: whatever it reads must outlive it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

# Runs before a capture, in which Triton compiles and cuDNN chooses its kernels.
WARM_UP_RUNS = 3

Result = TypeVar("Result")


@contextlib.contextmanager
def capture_stream(device: torch.device, warm_up: Callable[[], object]) -> Iterator[torch.cuda.Stream]:
    """A side stream on which `warm_up`, everything that will be captured, has run; for calls of `capture`.

    The current stream waits for it afterwards.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), cudnn_benchmark():
        for _ in range(WARM_UP_RUNS):
            warm_up()
        stream.synchronize()
        yield stream
    torch.cuda.current_stream(device).wait_stream(stream)


def capture(
    call: Callable[[], Result], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of what `call` enqueues, and the call's result, which each replay overwrites.

    pool: `torch.cuda.graph_pool_handle()` of graphs that share memory; only one of them may run at a time.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        result = call()
    return graph, result


@contextlib.contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN time its kernels for each new shape; restores the setting afterwards."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
