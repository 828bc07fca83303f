"""Measure the stages of a batch, from encoded images to JSON, and tabulate them.

The calls are those of the server's worker, timed through the stage timer that they accept; nothing is changed
for measuring. Device times are from CUDA events, host times from the host's clock. Copies (H2D, D2H) and
kernels come from torch.profiler in a separate pass, because profiling slows the host down.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from lib.cli import ScriptError
from lib.images import cycled
from lib.measure.timing import format_table, synchronize

from damoyolo.cores import usable_cores
from damoyolo.decode import decode_image
from damoyolo.detector import Detector
from damoyolo.service import DetectionService
from damoyolo.stage_timing import NETWORK, POSTPROCESS, StageClock, StageTimer, no_timing

OTHER = "other"
TOTAL = "total"
COLUMNS = {
    "stage": ("stage", ""),
    "ms": ("ms", ".3f"),
    "host_ms": ("host ms", ".3f"),
    "share": ("share", ".1%"),
    "images_per_s": ("images/s", ".0f"),
}
Row = dict[str, Any]
Answer = Callable[[StageTimer], object]


class NestedStageTimer:
    """A stage timer that passes stages on to others, with the names of the enclosing stages ("a/b")."""

    def __init__(self, *timers: StageTimer) -> None:
        self._timers = timers
        self._enclosing: list[str] = []

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._enclosing.append(stage)
        name = "/".join(self._enclosing)
        try:
            with contextlib.ExitStack() as stack:
                for time_stage in self._timers:
                    stack.enter_context(time_stage(name))
                yield
        finally:
            self._enclosing.pop()


@dataclass(frozen=True)
class StageTime:
    """Median milliseconds of a batch in a stage, on the device and on the host. Equal on a CPU.

    A stage inside another is named "outer/inner" and is part of the outer's time.
    """

    name: str
    device_ms: float
    host_ms: float

    @property
    def is_part(self) -> bool:
        """Whether the time is part of another stage's."""
        return "/" in self.name


@dataclass(frozen=True)
class CopyTimes:
    """Milliseconds per batch that the device spent on copies and on kernels; they may overlap."""

    h2d_ms: float
    d2h_ms: float
    kernels_ms: float


@dataclass(frozen=True)
class Profile:
    """The measurements of one batch size.

    stages: in their order. total_ms: of the whole batch, by the host's clock.
    cpu_decode_ms: for decoding the images with the thread pool alone. copies: None on a CPU.
    """

    batch_size: int
    stages: list[StageTime]
    total_ms: float
    cpu_decode_ms: float
    copies: CopyTimes | None

    def bars(self) -> dict[str, float]:
        """Milliseconds of each outer stage, and of the time between them."""
        times = {stage.name: stage.device_ms for stage in self.stages if not stage.is_part}
        return {**times, OTHER: max(0.0, self.total_ms - sum(times.values()))}


def answer_call(service: DetectionService, images: Sequence[bytes], batch_size: int) -> Answer:
    """What the worker does with a batch of single-image requests; each call takes other images."""
    batches = [
        [{"body": bytearray(image)} for image in cycled(images, batch_size, first)]
        for first in range(min(len(images), 8))
    ]
    headers: list[dict[str, Any]] = [{}] * batch_size
    calls = 0

    def answer(time_stage: StageTimer) -> object:
        nonlocal calls
        calls += 1
        answers = service.answer(batches[calls % len(batches)], headers, time_stage)
        failed = next((each.error for each in answers if each.error is not None), None)
        if failed is not None:
            raise ScriptError(f"the detector refuses one of the images: {failed}")
        return answers

    return answer


def measure_stages(answer: Answer, device: torch.device, batches: int) -> tuple[list[StageTime], float]:
    """Medians over some batches: of each stage, and of the whole batch in milliseconds."""
    on_device, on_host = StageClock(device), StageClock(torch.device("cpu"))
    time_stage = NestedStageTimer(on_device, on_host)
    device_s: dict[str, list[float]] = {}
    host_s: dict[str, list[float]] = {}
    total_s = []
    for _ in range(batches):
        synchronize(device)
        started = time.perf_counter()
        answer(time_stage)
        total_s.append(time.perf_counter() - started)
        for samples, clock in ((device_s, on_device), (host_s, on_host)):
            for stage, seconds in clock.read_seconds().items():
                samples.setdefault(stage, []).append(seconds)
    # A stage ends after those inside it: sort each outer stage before its parts.
    order = {name: index for index, name in enumerate(name for name in device_s if "/" not in name)}
    names = sorted(device_s, key=lambda name: (order.get(name.split("/")[0], len(order)), name.count("/")))
    stages = [
        StageTime(name, statistics.median(device_s[name]) * 1e3, statistics.median(host_s[name]) * 1e3)
        for name in names
    ]
    return stages, statistics.median(total_s) * 1e3


def measure_copies(answer: Answer, batches: int) -> CopyTimes:
    """Mean times per batch of copies and kernels on the CUDA device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(batches):
            answer(no_timing)
    totals_us = {"h2d": 0.0, "d2h": 0.0, "kernels": 0.0}
    for event in profiler.events() or []:
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        totals_us[device_activity(event.name)] += event.time_range.elapsed_us()
    return CopyTimes(*(totals_us[kind] / 1e3 / batches for kind in ("h2d", "d2h", "kernels")))


def device_activity(name: str) -> str:
    """The kind of a device event with this name: "h2d", "d2h" or, for all other work, "kernels"."""
    if name.startswith("Memcpy HtoD"):
        return "h2d"
    return "d2h" if name.startswith("Memcpy DtoH") else "kernels"


def measure_cpu_decode(detector: Detector, images: Sequence[bytes], batch_size: int, batches: int) -> float:
    """Median milliseconds to decode a batch on the CPU, with as many threads as the preprocessing has."""
    config = detector.config
    batch = cycled(images, batch_size)
    samples_s = []
    with ThreadPoolExecutor(config.decode_threads or usable_cores()) as pool:
        for _ in range(batches):
            started = time.perf_counter()
            for _image in pool.map(lambda image: decode_image(image, config), batch):
                pass
            samples_s.append(time.perf_counter() - started)
    return statistics.median(samples_s) * 1e3


def profile(
    service: DetectionService, images: Sequence[bytes], batch_size: int, batches: int, warm_up: int
) -> Profile:
    """Measure one batch size, after `warm_up` batches."""
    detector = service.detector
    answer = answer_call(service, images, batch_size)
    for _ in range(warm_up):
        answer(no_timing)
    stages, total_ms = measure_stages(answer, detector.device, batches)
    copies = measure_copies(answer, min(batches, 10)) if detector.device.type == "cuda" else None
    cpu_decode_ms = measure_cpu_decode(detector, images, batch_size, min(batches, 10))
    return Profile(batch_size, stages, total_ms, cpu_decode_ms, copies)


def stage_rows(measured: Profile) -> list[Row]:
    """Each stage, the time between the stages, and the whole batch."""
    host_ms = {stage.name: stage.host_ms for stage in measured.stages}
    times_ms = {stage.name: stage.device_ms for stage in measured.stages}
    times_ms |= {OTHER: measured.bars()[OTHER], TOTAL: measured.total_ms}
    rows = _rows(times_ms, measured.batch_size, measured.total_ms)
    return [{**row, "host_ms": host_ms.get(row["stage"])} for row in rows]


def device_rows(measured: Profile) -> list[Row]:
    """The usual four steps of inference on a device; copies as torch.profiler sees them. Empty on a CPU."""
    if measured.copies is None:
        return []
    times_ms = {stage.name: stage.device_ms for stage in measured.stages}
    steps_ms = {
        "H2D": measured.copies.h2d_ms,
        "compute": times_ms.get(NETWORK, 0.0),
        "D2H": measured.copies.d2h_ms,
        "NMS": max(0.0, times_ms.get(POSTPROCESS, 0.0) - measured.copies.d2h_ms),
    }
    return _rows(steps_ms, measured.batch_size, sum(steps_ms.values()))


def _rows(times_ms: dict[str, float], batch_size: int, total_ms: float) -> list[Row]:
    return [
        {
            "batch_size": batch_size,
            "stage": name,
            "ms": ms,
            "share": ms / total_ms if total_ms else None,
            "images_per_s": batch_size / ms * 1e3 if ms else None,
        }
        for name, ms in times_ms.items()
    ]


def report(measured: Profile) -> str:
    """The tables of one batch size as text."""
    parts = [f"batch {measured.batch_size}", format_table(stage_rows(measured), COLUMNS)]
    parts.append(f"decoding the batch on the CPU alone, by threads: {measured.cpu_decode_ms:.3f} ms")
    if measured.copies is not None:
        columns = {name: column for name, column in COLUMNS.items() if name != "host_ms"}
        parts += ["on the device", format_table(device_rows(measured), columns)]
        busy_ms = measured.copies.h2d_ms + measured.copies.d2h_ms + measured.copies.kernels_ms
        parts.append(
            f"kernels {measured.copies.kernels_ms:.3f} ms; with the copies the device is busy for "
            f"{busy_ms / measured.total_ms:.0%} of the batch's time"
        )
    return "\n".join(parts)
