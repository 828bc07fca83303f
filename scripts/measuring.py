"""Times of calls that are compared: in one run, in turn, after warming up, as medians."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch

Call = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_medians_s(
    calls: Mapping[str, Call], device: torch.device, rounds: int = 5, slice_s: float = 0.3
) -> dict[str, float]:
    """Median seconds of one execution of each call.

    The calls take turns, `rounds` times, `slice_s` seconds each turn (at least one execution), so that a
    machine that slows down or speeds up meanwhile does so for all of them. A turn is timed as a whole, from
    an idle device to an idle device, and gives one sample: its mean.
    """
    for call in calls.values():
        call()
    synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            executions = 0
            started = time.perf_counter()
            while executions == 0 or time.perf_counter() - started < slice_s:
                call()
                executions += 1
            synchronize(device)
            samples[name].append((time.perf_counter() - started) / executions)
    return {name: statistics.median(values) for name, values in samples.items()}


def environment() -> dict[str, Any]:
    """What a figure depends on beside the knobs: hardware and versions."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "cpu_threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
    }
    if torch.cuda.is_available():
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return facts


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
