"""Time the stages of a request from outside, so that measuring never edits what is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

PARSE = "parse"
PREPROCESS = "preprocess"
NETWORK = "network"
POSTPROCESS = "postprocess"
RESPOND = "respond"

StageTimer = Callable[[str], AbstractContextManager[Any]]


def no_timing(_stage: str) -> AbstractContextManager[None]:
    """A `StageTimer` that measures nothing."""
    return nullcontext()


class StageClock:
    """Sums the time of each stage; an instance is a `StageTimer`.

    On CUDA a stage is bounded by events on the device's current stream: work counts in the stage that queued
    it, not where the host happens to wait for it, and timing does not synchronise. Reading does. On a CPU it
    is bounded by readings of the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._bounds: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._mark()
        try:
            yield
        finally:
            self._bounds.append((stage, start, self._mark()))

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read_seconds(self) -> dict[str, float]:
        """Seconds per stage since the last reading; waits for the device on CUDA."""
        totals: dict[str, float] = {}
        bounds, self._bounds = self._bounds, []
        if self._on_cuda and bounds:
            bounds[-1][2].synchronize()
        for stage, start, end in bounds:
            seconds = start.elapsed_time(end) / 1e3 if self._on_cuda else end - start
            totals[stage] = totals.get(stage, 0.0) + seconds
        return totals
