"""Record a detector at work for other tools: chrome traces, NVTX ranges, memory snapshots."""

from __future__ import annotations

import multiprocessing
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.measure.stage_profile import Answer, NestedStageTimer
from lib.measure.timing import synchronize

from damoyolo.stage_timing import no_timing

WORKERS_TIMEOUT_S = 300.0


def write_trace(
    answer: Answer, device: torch.device, batches: int, path: Path, when_recording: Callable[[], object] = int
) -> None:
    """Write a chrome trace with the stages as ranges, for chrome://tracing or ui.perfetto.dev.

    when_recording: called before the first batch.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    time_stage = NestedStageTimer(lambda stage: torch.profiler.record_function(stage))
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        when_recording()
        for _ in range(batches):
            with torch.profiler.record_function("batch"):
                answer(time_stage)
        synchronize(device)
    profiler.export_chrome_trace(str(path))


@dataclass(frozen=True)
class WorkerRecording:
    """What a process of its own records: batches of one size, as a worker of the server."""

    archive: Path
    images: Sequence[bytes]
    device: str
    serving: Mapping[str, Any]
    batch_size: int
    batches: int


def write_traces_of_workers(
    recording: WorkerRecording, paths: Sequence[Path], environment: Mapping[str, str]
) -> None:
    """Let as many processes as there are paths work at the same time; each writes its trace to one of them.

    environment: variables for the processes.
    """
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        # What a worker waits for before it begins: all have loaded and record.
        ready = manager.Barrier(len(paths))
        with ProcessPoolExecutor(
            len(paths), context, initializer=_set_environment, initargs=(dict(environment),)
        ) as pool:
            for done in [pool.submit(_record_worker, recording, path, ready) for path in paths]:
                done.result(WORKERS_TIMEOUT_S)


def _set_environment(variables: Mapping[str, str]) -> None:
    os.environ.update(variables)


def _record_worker(recording: WorkerRecording, path: Path, ready: Any) -> None:
    from lib.archive.reader import load_detector
    from lib.measure.stage_profile import answer_call

    from damoyolo.cuda.startup_lock import exclusive_device_lock
    from damoyolo.service import DetectionService

    device = torch.device(recording.device)
    with exclusive_device_lock(device):
        service = DetectionService(load_detector(recording.archive, device, **recording.serving))
        answer = answer_call(service, recording.images, recording.batch_size)
        for _ in range(3):
            answer(no_timing)
    try:
        write_trace(answer, device, recording.batches, path, lambda: ready.wait(WORKERS_TIMEOUT_S))
    finally:
        service.close()


def run_with_nvtx(answer: Answer, device: torch.device, batches: int) -> None:
    """Run batches between cudaProfilerStart and -Stop, each batch and stage being an NVTX range."""
    time_stage = NestedStageTimer(lambda stage: torch.cuda.nvtx.range(stage))
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    for _ in range(batches):
        with torch.cuda.nvtx.range("batch"):
            answer(time_stage)
    synchronize(device)
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def nsys_command(arguments: Sequence[str]) -> str:
    """The command that records scripts/profile_detector.py --nvtx with `arguments` in Nsight Systems."""
    command = ["nsys", "profile", "-t", "cuda,nvtx,osrt"]
    # Record only between cudaProfilerStart and -Stop, without loading, capturing and warming up.
    command += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
    # By default a CUDA graph is shown as one bar.
    command += ["--cuda-graph-trace=node", "--force-overwrite=true", "-o", "output/profile_detector"]
    return shlex.join([*command, "python", "scripts/profile_detector.py", "--nvtx", *arguments])


def write_memory_snapshot(answer: Answer, batches: int, path: Path) -> None:
    """Write what the CUDA allocator did during some batches, for pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        for _ in range(batches):
            answer(no_timing)
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
