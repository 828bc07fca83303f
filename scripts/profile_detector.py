"""Where the time of a batch goes, from encoded images to JSON, stage by stage.

    python scripts/profile_detector.py --batch-sizes 1 32 --plot output/stages.png
    python scripts/profile_detector.py --batch-sizes 32 --trace output/trace.json

Every figure comes from the calls that the server's worker makes, watched through the observer that they take;
nothing is changed for measuring. Device times are from CUDA events, host times from the host's clock: where
the host's are the larger ones, the device waits. Copies (H2D, D2H) and kernels come from torch.profiler in a
pass of its own, because profiling slows the host down.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from lib.archive.members import BatchingSetting
from lib.archive.reader import load_detector
from lib.cli import positive_int
from lib.images import cycled, read_images
from lib.measure.environment import environment
from lib.measure.plots import plot_shares
from lib.measure.timing import append_json_rows, format_table, synchronize
from lib.paths import DEMO_ARCHIVE, SAMPLE_IMAGES

from damoyolo.decode import decode_image
from damoyolo.detector import Detector
from damoyolo.service import DetectionService
from damoyolo.stage_timing import NETWORK, POSTPROCESS, StageClock, StageTimer, no_timing

OTHER = "other"
TOTAL = "total"
NVTX_BATCHES = 20


class NestedObserver:
    """An observer that passes stages on to others, each with the stages around it in its name ("a/b")."""

    def __init__(self, *observers: StageTimer) -> None:
        self._observers = observers
        self._around: list[str] = []

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._around.append(stage)
        name = "/".join(self._around)
        try:
            with contextlib.ExitStack() as stack:
                for observer in self._observers:
                    stack.enter_context(observer(name))
                yield
        finally:
            self._around.pop()


@dataclass(frozen=True)
class StageTime:
    """Median milliseconds of a batch in a stage: between its bounds on the device, and on the host.

    On a CPU both are the same. A stage inside another is named "outer/inner" and part of the outer's time.
    """

    name: str
    device_ms: float
    host_ms: float

    @property
    def is_part(self) -> bool:
        """Whether the time is already in another stage's."""
        return "/" in self.name


@dataclass(frozen=True)
class Profile:
    """The stages of one batch size, in their order, and the whole batch by the host's clock."""

    batch_size: int
    stages: list[StageTime]
    total_ms: float
    cpu_decode_ms: float  # the images' decoding by the pool of threads alone, for comparison
    copies: CopyTimes | None  # None on a CPU

    def bars(self) -> dict[str, float]:
        """Milliseconds of each stage that is no part of another, and of what lies between them."""
        times = {stage.name: stage.device_ms for stage in self.stages if not stage.is_part}
        return {**times, OTHER: max(0.0, self.total_ms - sum(times.values()))}


@dataclass(frozen=True)
class CopyTimes:
    """Milliseconds of a batch that the device spent on copies and on kernels; they may overlap."""

    h2d_ms: float
    d2h_ms: float
    kernels_ms: float


Answer = Callable[[StageTimer], object]


def answer_call(service: DetectionService, images: Sequence[bytes], batch_size: int) -> Answer:
    """What the worker does with a batch of single-image requests; every call brings other images."""
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
            raise ValueError(f"the detector refuses one of the images: {failed}")
        return answers

    return answer


def measure_stages(answer: Answer, device: torch.device, batches: int) -> tuple[list[StageTime], float]:
    """Medians over so many batches: of each stage, and of the whole batch in milliseconds."""
    on_device, on_host = StageClock(device), StageClock(torch.device("cpu"))
    observer = NestedObserver(on_device, on_host)
    device_s: dict[str, list[float]] = {}
    host_s: dict[str, list[float]] = {}
    total_s = []
    for _ in range(batches):
        synchronize(device)
        started = time.perf_counter()
        answer(observer)
        total_s.append(time.perf_counter() - started)
        for samples, clock in ((device_s, on_device), (host_s, on_host)):
            for stage, seconds in clock.read_seconds().items():
                samples.setdefault(stage, []).append(seconds)
    # A stage ends after those inside it; by name the outer comes before its parts, in the order of the outer.
    order = {name: index for index, name in enumerate(name for name in device_s if "/" not in name)}
    names = sorted(device_s, key=lambda name: (order.get(name.split("/")[0], len(order)), name.count("/")))
    stages = [
        StageTime(name, statistics.median(device_s[name]) * 1e3, statistics.median(host_s[name]) * 1e3)
        for name in names
    ]
    return stages, statistics.median(total_s) * 1e3


def measure_copies(answer: Answer, batches: int) -> CopyTimes:
    """Mean times of copies and kernels on the CUDA device over so many batches."""
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
    """What a device event of this name is: "h2d", "d2h" or, for all other work, "kernels"."""
    if name.startswith("Memcpy HtoD"):
        return "h2d"
    return "d2h" if name.startswith("Memcpy DtoH") else "kernels"


def measure_cpu_decode(detector: Detector, images: Sequence[bytes], batch_size: int, batches: int) -> float:
    """Median milliseconds in which as many threads as the preprocessing has decode a batch on the CPU."""
    config = detector.config
    batch = cycled(images, batch_size)
    samples_s = []
    with ThreadPoolExecutor(config.decode_threads or len(os.sched_getaffinity(0))) as pool:
        for _ in range(batches):
            started = time.perf_counter()
            for _image in pool.map(lambda image: decode_image(image, config), batch):
                pass
            samples_s.append(time.perf_counter() - started)
    return statistics.median(samples_s) * 1e3


def profile(
    service: DetectionService, images: Sequence[bytes], batch_size: int, batches: int, warm_up: int
) -> Profile:
    """The times of one batch size."""
    detector = service.detector
    answer = answer_call(service, images, batch_size)
    for _ in range(warm_up):
        answer(no_timing)
    stages, total_ms = measure_stages(answer, detector.device, batches)
    copies = measure_copies(answer, min(batches, 10)) if detector.device.type == "cuda" else None
    cpu_decode_ms = measure_cpu_decode(detector, images, batch_size, min(batches, 10))
    return Profile(batch_size, stages, total_ms, cpu_decode_ms, copies)


def profile_rows(measured: Profile) -> list[dict[str, Any]]:
    """The stage table: each stage, what lies between them, and the whole batch."""
    host_ms = {stage.name: stage.host_ms for stage in measured.stages}
    times_ms = {stage.name: stage.device_ms for stage in measured.stages}
    times_ms |= {OTHER: measured.bars()[OTHER], TOTAL: measured.total_ms}
    return [
        {
            "batch_size": measured.batch_size,
            "stage": name,
            "ms": ms,
            "host_ms": host_ms.get(name),
            "share": ms / measured.total_ms,
            "images_per_s": measured.batch_size / ms * 1e3 if ms else None,
        }
        for name, ms in times_ms.items()
    ]


def device_rows(measured: Profile) -> list[dict[str, Any]]:
    """The four steps that inference on a device is often divided into; copies as torch.profiler sees them."""
    if measured.copies is None:
        return []
    times_ms = {stage.name: stage.device_ms for stage in measured.stages}
    steps_ms = {
        "H2D": measured.copies.h2d_ms,
        "compute": times_ms.get(NETWORK, 0.0),
        "D2H": measured.copies.d2h_ms,
        "NMS": max(0.0, times_ms.get(POSTPROCESS, 0.0) - measured.copies.d2h_ms),
    }
    total_ms = sum(steps_ms.values())
    return [
        {
            "batch_size": measured.batch_size,
            "stage": name,
            "ms": ms,
            "share": ms / total_ms if total_ms else None,
            "images_per_s": measured.batch_size / ms * 1e3 if ms else None,
        }
        for name, ms in steps_ms.items()
    ]


COLUMNS = {
    "stage": ("stage", ""),
    "ms": ("ms", ".3f"),
    "host_ms": ("host ms", ".3f"),
    "share": ("share", ".1%"),
    "images_per_s": ("images/s", ".0f"),
}


def report(measured: Profile) -> str:
    """The tables of one batch size as text."""
    parts = [f"batch {measured.batch_size}", format_table(profile_rows(measured), COLUMNS)]
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


def write_trace(answer: Answer, device: torch.device, batches: int, path: Path) -> None:
    """A chrome trace of so many batches, with the stages as ranges (chrome://tracing or ui.perfetto.dev)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    observer = NestedObserver(_recorded_function)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(batches):
            with torch.profiler.record_function("batch"):
                answer(observer)
        synchronize(device)
    profiler.export_chrome_trace(str(path))


def _recorded_function(stage: str) -> AbstractContextManager[Any]:
    return torch.profiler.record_function(stage)


def run_with_nvtx(answer: Answer, batches: int) -> None:
    """So many batches between cudaProfilerStart and -Stop, each batch and stage an NVTX range."""
    observer = NestedObserver(_nvtx_range)
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    for _ in range(batches):
        with _nvtx_range("batch"):
            answer(observer)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def _nvtx_range(stage: str) -> AbstractContextManager[Any]:
    return torch.cuda.nvtx.range(stage)


def nsys_command(arguments: Sequence[str]) -> str:
    """The command that shows the NVTX ranges of this script over the device's work in Nsight Systems.

    arguments: this script's own, without those that take other paths.
    """
    command = ["nsys", "profile", "-t", "cuda,nvtx,osrt"]
    # Only what lies between cudaProfilerStart and -Stop, which leaves out loading, recording and warming up.
    command += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
    # Without it a CUDA graph is one bar.
    command += ["--cuda-graph-trace=node", "--force-overwrite=true", "-o", "output/profile_detector"]
    return shlex.join([*command, "python", "scripts/profile_detector.py", "--nvtx", *arguments])


def write_memory_snapshot(answer: Answer, batches: int, path: Path) -> None:
    """What the allocator did in so many batches, for pytorch.org/memory_viz; CUDA alone."""
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        for _ in range(batches):
            answer(no_timing)
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write what was asked for."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type != "cuda" and (arguments.nvtx or arguments.memory_snapshot):
        parser.error("--nvtx and --memory-snapshot need a CUDA device")
    try:
        images = read_images(arguments.images)
        sizes = BatchingSetting(max(arguments.batch_sizes), 1, 1).serving_settings()
        serving = {**sizes, **({"precision": arguments.precision} if arguments.precision else {})}
        service = DetectionService(load_detector(arguments.archive, device, **serving))
    except FileNotFoundError as error:
        print(f"profile_detector: {error}", file=sys.stderr)
        return 1
    try:
        return _run(arguments, service, images)
    finally:
        service.close()


def _run(arguments: argparse.Namespace, service: DetectionService, images: Sequence[bytes]) -> int:
    device = service.detector.device
    largest = max(arguments.batch_sizes)
    answer = answer_call(service, images, largest)
    if arguments.nvtx:
        for _ in range(arguments.warm_up):
            answer(no_timing)
        run_with_nvtx(answer, min(arguments.batches, NVTX_BATCHES))
        print(f"{min(arguments.batches, NVTX_BATCHES)} batches of {largest} with NVTX ranges")
        return 0
    facts = {**environment(), "precision": service.detector.pipeline.precision, "device": str(device)}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    profiles = [
        profile(service, images, batch_size, arguments.batches, arguments.warm_up)
        for batch_size in arguments.batch_sizes
    ]
    print("\n\n".join(map(report, profiles)))
    for path, write in (
        (arguments.trace, functools.partial(write_trace, answer, device, 5)),
        (arguments.memory_snapshot, functools.partial(write_memory_snapshot, answer, 5)),
    ):
        if path is not None:
            answer(no_timing)
            write(path)
            print(f"written: {path}")
    if arguments.json:
        rows: list[Mapping[str, Any]] = []
        for measured in profiles:
            rows += [{"table": "stages", **row} for row in profile_rows(measured)]
            rows += [{"table": "device", **row} for row in device_rows(measured)]
        append_json_rows(arguments.json, rows, facts)
    if arguments.plot:
        bars = {f"batch {measured.batch_size}": measured.bars() for measured in profiles}
        plot_shares(arguments.plot, bars, "where the time of a batch goes")
    own = ["--archive", str(arguments.archive), "--batch-sizes", str(largest)]
    print(f"timeline in Nsight Systems: {nsys_command(own)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, default=DEMO_ARCHIVE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", help="default: the archive's")
    parser.add_argument("--batch-sizes", nargs="+", type=positive_int, default=[1, 8, 32])
    parser.add_argument(
        "--batches", type=positive_int, default=50, metavar="N", help="measured (%(default)s)"
    )
    parser.add_argument("--warm-up", type=positive_int, default=5, metavar="N", help="batches before")
    parser.add_argument("--images", type=Path, default=SAMPLE_IMAGES, help="folder of JPEG files")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="chrome trace of 5 batches of the largest size"
    )
    parser.add_argument(
        "--memory-snapshot",
        type=Path,
        metavar="FILE",
        help="of the CUDA allocator, for pytorch.org/memory_viz",
    )
    parser.add_argument(
        "--nvtx", action="store_true", help="only run batches with NVTX ranges, for nsys (printed otherwise)"
    )
    parser.add_argument("--json", type=Path, help="file that gets one JSON row a stage")
    parser.add_argument("--plot", type=Path, help="PNG of the stages' shares")
    return parser


if __name__ == "__main__":
    sys.exit(main())
