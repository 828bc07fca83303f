"""Find the batching settings for this machine: first the batch size in this process, then with the server.

    python scripts/tune.py --archive model_store/damoyolo.mar --p99-ms 50 --output output/model-config.yaml

The sweep tries growing batch sizes until the memory is full. The search then starts a TorchServe for each
setting of batch size, delay and workers that it tries, measures it with closed loops, and keeps the highest
rate whose p99 is within the budget. The recommended model-config.yaml replaces handler/model-config.yaml,
which scripts/build_archive.py packs.

With --gpus the search is done for each of these numbers of GPUs in turn. --workers is then per GPU; the
workers that are printed and written are those of all GPUs together.

Prints each measurement and the recommended setting.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import ScriptError, command_parser, positive_int, positive_number, run_command
from lib.paths import DEMO_ARCHIVE, HANDLER_DIR, PROJECT_DIR, SAMPLE_IMAGES

if TYPE_CHECKING:
    from lib.measure.batch_sweep import BatchTime
    from lib.measure.batching_search import SearchResult, SearchSpace

RECOMMENDED = PROJECT_DIR / "output" / "model-config.yaml"
SWEEP_COLUMNS = {
    "batch": ("batch", "d"),
    "network_ms": ("network ms", ".2f"),
    "network_per_s": ("images/s", ".1f"),
    "detector_ms": ("detector ms", ".2f"),
    "detector_per_s": ("images/s", ".1f"),
    "peak_mib": ("peak MiB", ".0f"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep, search, write the recommendation."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    from lib.images import read_images
    from lib.measure.batching_search import SearchSpace
    from lib.measure.environment import environment
    from lib.measure.timing import append_json_rows
    from lib.server.gpus import first_gpus

    for gpus in arguments.gpus:
        first_gpus(gpus)  # refuses before anything is measured
    images = read_images(arguments.images)
    facts = {"mps": arguments.mps, **environment()}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows: list[dict[str, Any]] = []
    batch_sizes = sorted(set(arguments.batch_sizes))
    if not arguments.no_sweep:
        times = _sweep(arguments, images, batch_sizes)
        rows += [{"step": "sweep", **time._asdict(), "images_per_s": time.images_per_s} for time in times]
        # A batch that computes for longer than the budget cannot answer within it.
        in_time = [time for time in times if time.detector_s * 1e3 <= arguments.p99_ms] or times[:1]
        batch_sizes = [time.batch_size for time in in_time]
    if not arguments.sweep_only:
        found: list[tuple[SearchResult, SearchSpace]] = []
        for gpus in arguments.gpus or [None]:
            workers = sorted({count * (gpus or 1) for count in arguments.workers})
            space = SearchSpace(batch_sizes, sorted(set(arguments.delays)), workers)
            result = _search(arguments, images, space, gpus)
            found.append((result, space))
            rows += [
                {"step": "search", "gpus": gpus, **asdict(setting), **asdict(measured)}
                | {"chosen": setting == result.best}
                for setting, measured in result.trials.items()
                if measured.p99_ms < math.inf
            ]
        _recommend(arguments, *max(found, key=lambda each: _rank(each[0], arguments.p99_ms)))
    if arguments.jsonl:
        append_json_rows(arguments.jsonl, rows, {"p99_budget_ms": arguments.p99_ms, **facts})


def _rank(result: SearchResult, budget_ms: float) -> tuple[bool, float]:
    """Of several searches the one within the budget and of the highest rate is recommended."""
    measured = result.best_measurement()
    return measured.meets(budget_ms), measured.requests_per_s


def _reporter(arguments: argparse.Namespace) -> Callable[[str], None]:
    def report(message: str) -> None:
        if not arguments.quiet:
            print(f"  {message}", flush=True)

    return report


def _sweep(
    arguments: argparse.Namespace, images: Sequence[bytes], batch_sizes: Sequence[int]
) -> list[BatchTime]:
    from lib.devices import open_device
    from lib.measure import batch_sweep
    from lib.measure.timing import format_table

    device = open_device(arguments.device)
    print(f"batch sizes in this process, on {device}:")
    times = batch_sweep.sweep_batch_sizes(
        lambda batch_size: batch_sweep.measure_batch(arguments.archive, images, device, batch_size),
        batch_sizes,
        _reporter(arguments),
    )
    if not times:
        raise ScriptError("not even one image fits into the memory")
    rows = [
        {
            "batch": time.batch_size,
            "network_ms": time.network_s * 1e3,
            "network_per_s": time.batch_size / time.network_s,
            "detector_ms": time.detector_s * 1e3,
            "detector_per_s": time.images_per_s,
            "peak_mib": time.peak_memory_bytes and time.peak_memory_bytes / 2**20,
        }
        for time in times
    ]
    print(format_table(rows, SWEEP_COLUMNS))
    recommended = batch_sweep.recommended_batch_size(times)
    print(
        f"recommended without a server: batch {recommended}, the smallest within {batch_sweep.WITHIN:.0%} of "
        "the best rate"
    )
    return times


def _search(
    arguments: argparse.Namespace, images: Sequence[bytes], space: SearchSpace, gpus: int | None
) -> SearchResult:
    from lib.load.worker import Load
    from lib.measure.batching_search import find_setting
    from lib.measure.served_setting import SettingMeasurer
    from lib.server.gpus import gpu_environment

    load = Load(
        "",
        images,
        connections=1,
        warm_up_s=arguments.warm_up,
        duration_s=arguments.duration,
        timeout_s=arguments.timeout,
    )
    on, report = "" if gpus is None else f" on GPUs: {gpus}", _reporter(arguments)
    print(f"settings with the server{on}, p99 at most {arguments.p99_ms:g} ms:")
    with (
        gpu_environment(gpus, arguments.mps) as variables,
        SettingMeasurer(arguments.archive, load, arguments.p99_ms, report, variables) as measure,
    ):
        result = find_setting(measure, space, arguments.p99_ms)
    grid = len(space.batch_sizes) * len(space.delays_ms) * len(space.workers)
    print(
        f"{len(result.trials)} settings tried of {grid}; the best: {result.best}: {result.best_measurement()}"
    )
    return result


def _recommend(arguments: argparse.Namespace, result: SearchResult, space: SearchSpace) -> None:
    from lib.archive.members import settings_text_with

    assert result.best is not None
    best, measured = result.best, result.best_measurement()
    if math.isinf(measured.p99_ms):
        raise ScriptError("no setting could be measured; the lines above say why")
    verdict = "recommended" if measured.meets(arguments.p99_ms) else "nothing meets the budget; the closest"
    print(f"{verdict}: {best}: {measured}")
    template = HANDLER_DIR / "model-config.yaml"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(settings_text_with(template.read_text(), best))
    print(f"written to {arguments.output}")
    if arguments.plot:
        _plot(arguments.plot, result, space, arguments.p99_ms)


def _plot(path: Path, result: SearchResult, space: SearchSpace, budget_ms: float) -> None:
    from lib.measure.plots import RatePoint, plot_latency_against_throughput

    assert result.best is not None
    points = {
        setting: RatePoint(
            measured.requests_per_s,
            measured.p50_ms,
            measured.p99_ms,
            f"{setting.batch_size}/{setting.delay_ms}",
        )
        for setting, measured in result.trials.items()
        if measured.p99_ms < math.inf
    }
    by_workers = {
        f"workers {workers} (batch/delay)": [
            point for setting, point in points.items() if setting.workers == workers
        ]
        for workers in space.workers
    }
    plot_latency_against_throughput(
        path,
        {name: group for name, group in by_workers.items() if group},
        "batching settings",
        chosen=points[result.best]._replace(label=str(result.best)) if result.best in points else None,
        budget_ms=budget_ms,
        connected=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__, renamed_options={"--pictures": "--images", "--write": "--output", "--json": "--jsonl"}
    )
    add = parser.add_argument
    add("--archive", type=Path, default=DEMO_ARCHIVE, help="the .mar to tune (%(default)s)")
    budget = "the latency budget (%(default)s)"
    add("--p99-ms", type=positive_number, default=100.0, metavar="MS", help=budget)
    add("--batch-sizes", nargs="+", type=positive_int, default=[1, 2, 4, 8, 16, 32, 64], metavar="N")
    add("--delays", nargs="+", type=positive_int, default=[1, 2, 5, 10, 20], metavar="MS")
    add("--workers", nargs="+", type=positive_int, default=[1, 2, 3, 4], metavar="N")
    add("--device", help="of the sweep (default: cuda where there is one)")
    add("--gpus", nargs="+", type=positive_int, default=[], metavar="N", help="search for N GPUs in turn")
    add("--mps", action="store_true", help="workers share a GPU by NVIDIA MPS")
    add("--duration", type=positive_number, default=5.0, metavar="S", help="of each load (%(default)s)")
    add("--warm-up", type=positive_number, default=1.5, metavar="S", help="before each load (%(default)s)")
    add("--timeout", type=positive_number, default=10.0, metavar="S", help="of each request (%(default)s)")
    add("--images", type=Path, default=SAMPLE_IMAGES, help="folder of JPEG files (%(default)s)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--sweep-only", action="store_true", help="stop after the sweep in this process")
    only.add_argument("--no-sweep", action="store_true", help="search with the server alone")
    settings = "gets the recommended settings (%(default)s)"
    add("--output", type=Path, metavar="FILE", default=RECOMMENDED, help=settings)
    add("--plot", type=Path, metavar="FILE", help="plot p99 against throughput with the chosen setting")
    add("--jsonl", type=Path, metavar="FILE", help="append a line of JSON for each measurement")
    add("--quiet", action="store_true", help="print tables and results alone, no line for each measurement")
    return parser


if __name__ == "__main__":
    sys.exit(main())
