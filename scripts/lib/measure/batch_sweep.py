"""Time growing batch sizes in this process, until the memory is full."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lib.archive.reader import load_detector
from lib.measure.calls import batch_seconds

WITHIN = 0.05  # of the best rate: a smaller batch that comes so close waits less and needs less memory


class BatchTime(NamedTuple):
    """Median seconds of a batch in this process: of the network alone and of the whole detector."""

    batch_size: int
    network_s: float
    detector_s: float
    peak_memory_bytes: int | None

    @property
    def images_per_s(self) -> float:
        """Of the whole detector."""
        return self.batch_size / self.detector_s


def sweep_batch_sizes(
    measure: Callable[[int], BatchTime], batch_sizes: Sequence[int], report: Callable[[str], None]
) -> list[BatchTime]:
    """The times of the batch sizes, ascending; a size too large for the memory is halved until one fits."""
    measured: dict[int, BatchTime] = {}
    waiting = sorted(set(batch_sizes))
    while waiting:
        batch_size = waiting.pop(0)
        free_device_memory()
        try:
            measured[batch_size] = measure(batch_size)
            continue
        except (torch.OutOfMemoryError, MemoryError):
            pass  # its memory is freed later: the exception refers to what the failed batch had allocated
        half = batch_size // 2
        waiting = [half] if half > max(measured, default=0) else []
        report(
            f"batch {batch_size} does not fit into the memory; "
            + (f"going on with {half}" if waiting else "that ends the sweep")
        )
    free_device_memory()
    return [measured[batch_size] for batch_size in sorted(measured)]


def recommended_batch_size(times: Sequence[BatchTime]) -> int:
    """The smallest batch whose rate is close to the best.

    Raises:
        ValueError: no batch size could be measured.
    """
    best = max(time.images_per_s for time in times)
    return next(time.batch_size for time in times if time.images_per_s >= (1 - WITHIN) * best)


def measure_batch(archive: Path, images: Sequence[bytes], device: torch.device, batch_size: int) -> BatchTime:
    """The times of one batch size, with a detector made for it."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    detector = load_detector(archive, device, graph_batch_sizes=[batch_size])
    try:
        network_s, detector_s = batch_seconds(detector, images, batch_size, rounds=3)
    finally:
        detector.close()
    peak = torch.cuda.max_memory_reserved(device) if on_cuda else None
    return BatchTime(batch_size, network_s, detector_s, peak)


def free_device_memory() -> None:
    """Release memory that no tensor uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
