"""Show how the time of a batch is spent, from encoded images to JSON, stage by stage.

    python scripts/profile_detector.py --batch-sizes 1 32 --plot output/stages.png
    python scripts/profile_detector.py --batch-sizes 32 --trace output/trace.json
    python scripts/profile_detector.py --batch-sizes 64 --timeline output/timeline.png --workers 4 --mps

The calls are those of the server's worker. Device times are from CUDA events, host times from the host's
clock: where the host's are larger, the device waits. Copies (H2D, D2H) and kernels come from torch.profiler
in a separate pass. --timeline draws the traces of one or several processes that work at the same time.

Prints a table for each batch size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import ScriptError, command_parser, positive_int, positive_number, run_command
from lib.paths import DEMO_ARCHIVE, SAMPLE_IMAGES

if TYPE_CHECKING:
    from damoyolo.service import DetectionService

NVTX_BATCHES = 20
TRACE_BATCHES = 5
TIMELINE_BATCHES = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the requested files."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:

    from lib.archive.members import BatchingSetting
    from lib.archive.reader import load_detector
    from lib.devices import open_device
    from lib.images import read_images

    from damoyolo.service import DetectionService

    device = open_device(arguments.device)
    if device.type != "cuda" and (arguments.nvtx or arguments.memory_snapshot):
        raise ScriptError(f"the device is {device}; --nvtx and --memory-snapshot need a CUDA device")
    if arguments.mps and device.type != "cuda":
        raise ScriptError(f"the device is {device}; --mps needs a CUDA device")
    images = read_images(arguments.images)
    serving = BatchingSetting(max(arguments.batch_sizes), 1, 1).serving_settings()
    if arguments.precision:
        serving["precision"] = arguments.precision
    if arguments.timeline:
        _draw_timeline(arguments, str(device), serving, images)
        return
    service = DetectionService(load_detector(arguments.archive, device, **serving))
    try:
        if arguments.nvtx:
            _run_for_nsys(arguments, service, images)
        else:
            _measure(arguments, service, images)
            _record(arguments, service, images)
    finally:
        service.close()


def _draw_timeline(
    arguments: argparse.Namespace, device: str, serving: Mapping[str, Any], images: Sequence[bytes]
) -> None:
    from lib.measure.timeline import draw_timeline, read_trace
    from lib.measure.traces import WorkerRecording, write_traces_of_workers
    from lib.server.mps import cuda_mps

    batch_size = max(arguments.batch_sizes)
    serving = {**serving, "graph_batch_sizes": [batch_size], "device_turns": arguments.device_turns}
    recording = WorkerRecording(arguments.archive, images, device, serving, batch_size, TIMELINE_BATCHES)
    arguments.timeline.parent.mkdir(parents=True, exist_ok=True)
    paths = [arguments.timeline.with_suffix(f".{index}.json") for index in range(1, arguments.workers + 1)]
    with cuda_mps(arguments.mps) as variables:
        write_traces_of_workers(recording, paths, variables)
    turns = f", {arguments.device_turns} at a time" if arguments.device_turns else ""
    title = f"{arguments.workers} worker(s), batch {batch_size}{turns}"
    draw_timeline(arguments.timeline, list(map(read_trace, paths)), title, arguments.timeline_ms)
    print(f"written: {arguments.timeline}, from {', '.join(map(str, paths))}")


def _run_for_nsys(arguments: argparse.Namespace, service: DetectionService, images: Sequence[bytes]) -> None:
    from lib.measure.stage_profile import answer_call
    from lib.measure.traces import run_with_nvtx

    from damoyolo.stage_timing import no_timing

    largest, batches = max(arguments.batch_sizes), min(arguments.batches, NVTX_BATCHES)
    answer = answer_call(service, images, largest)
    for _ in range(arguments.warm_up):
        answer(no_timing)
    run_with_nvtx(answer, service.detector.device, batches)
    print(f"{batches} batches of {largest} with NVTX ranges")


def _measure(arguments: argparse.Namespace, service: DetectionService, images: Sequence[bytes]) -> None:
    """The stage tables, their JSON rows and their plot."""
    from lib.measure.environment import environment
    from lib.measure.plots import plot_shares
    from lib.measure.stage_profile import device_rows, profile, report, stage_rows
    from lib.measure.timing import append_json_rows

    detector = service.detector
    facts = {**environment(), "precision": detector.pipeline.precision, "device": str(detector.device)}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    profiles = [
        profile(service, images, batch_size, arguments.batches, arguments.warm_up)
        for batch_size in arguments.batch_sizes
    ]
    print("\n\n".join(map(report, profiles)))
    if arguments.jsonl:
        rows: list[Mapping[str, Any]] = []
        for measured in profiles:
            rows += [{"table": "stages", **row} for row in stage_rows(measured)]
            rows += [{"table": "device", **row} for row in device_rows(measured)]
        append_json_rows(arguments.jsonl, rows, facts)
    if arguments.plot:
        bars = {f"batch {measured.batch_size}": measured.bars() for measured in profiles}
        plot_shares(arguments.plot, bars, "where the time of a batch goes")


def _record(arguments: argparse.Namespace, service: DetectionService, images: Sequence[bytes]) -> None:
    """The recordings of the largest batch size for other tools."""
    from lib.measure.stage_profile import answer_call
    from lib.measure.traces import nsys_command, write_memory_snapshot, write_trace

    from damoyolo.stage_timing import no_timing

    largest = max(arguments.batch_sizes)
    answer = answer_call(service, images, largest)
    if arguments.trace:
        answer(no_timing)
        write_trace(answer, service.detector.device, TRACE_BATCHES, arguments.trace)
        print(f"written: {arguments.trace}")
    if arguments.memory_snapshot:
        answer(no_timing)
        write_memory_snapshot(answer, TRACE_BATCHES, arguments.memory_snapshot)
        print(f"written: {arguments.memory_snapshot}")
    own = ["--archive", str(arguments.archive), "--batch-sizes", str(largest)]
    print(f"timeline in Nsight Systems: {nsys_command(own)}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, {"--pictures": "--images", "--json": "--jsonl"})
    parser.add_argument("--archive", type=Path, default=DEMO_ARCHIVE)
    parser.add_argument("--device", help="cpu or cuda[:index] (a GPU if there is one)")
    parser.add_argument("--precision", help="(the archive's)")
    parser.add_argument("--batch-sizes", nargs="+", type=positive_int, default=[1, 8, 32])
    parser.add_argument(
        "--batches", type=positive_int, default=50, metavar="N", help="to measure (%(default)s)"
    )
    parser.add_argument(
        "--warm-up", type=positive_int, default=5, metavar="N", help="batches before measuring (%(default)s)"
    )
    parser.add_argument("--images", type=Path, default=SAMPLE_IMAGES, help="folder of JPEG files")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="chrome trace of 5 batches of the largest size"
    )
    add = parser.add_argument_group("timeline (replaces the tables)").add_argument
    add(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="draw host and GPU; the traces stay beside it",
    )
    add("--workers", type=positive_int, default=1, metavar="N", help="processes at the same time")
    add("--mps", action="store_true", help="they share the GPU by NVIDIA MPS")
    add(
        "--device-turns",
        type=positive_int,
        default=0,
        metavar="N",
        help="their device_turns (%(default)s)",
    )
    add("--timeline-ms", type=positive_number, default=60.0, metavar="MS", help="length (%(default)s)")
    parser.add_argument(
        "--memory-snapshot",
        type=Path,
        metavar="FILE",
        help="of the CUDA allocator, for pytorch.org/memory_viz",
    )
    parser.add_argument(
        "--nvtx", action="store_true", help="only run batches with NVTX ranges, for the nsys command printed"
    )
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="append a line of JSON for each stage")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the stages' shares")
    return parser


if __name__ == "__main__":
    sys.exit(main())
