"""Find the batching settings for this machine: first the batch size in this process, then with the server.

    python scripts/tune.py --archive model_store/damoyolo.mar --p99-ms 50 --write output/model-config.yaml

The sweep doubles the batch size and survives running out of memory. The search then starts a TorchServe for
each setting of batch size, delay and workers that it tries, puts closed loops on it, and keeps the highest
rate whose p99 is within the budget. The recommended model-config.yaml replaces handler/model-config.yaml,
which scripts/build_archive.py packs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import requests
import torch

from lib.archive.members import BatchingSetting, settings_text_with
from lib.archive.reader import load_detector
from lib.cli import positive_int, positive_seconds
from lib.images import read_images
from lib.load.generator import Load, LoadError, generate_load
from lib.measure.batching_search import Measurement, SearchResult, SearchSpace, find_setting
from lib.measure.calls import batch_seconds
from lib.measure.environment import environment
from lib.measure.plots import RatePoint, plot_latency_against_throughput
from lib.measure.timing import append_json_rows, format_table
from lib.paths import DEMO_ARCHIVE, HANDLER_DIR, PROJECT_DIR, SAMPLE_IMAGES
from lib.server.metrics import scale_workers
from lib.server.mps import MpsError, cuda_mps
from lib.server.process import ServerStartError
from lib.server.served_archive import ServedModel, serve_with_setting

WITHIN = 0.05  # of the best rate: a smaller batch that comes so close waits less and needs less memory
# Closed loops of a setting, in multiples of what its workers take at once. One round in work and one waiting
# keeps all busy; where that is too slow for the budget, half of it may do.
ROUNDS_IN_FLIGHT = (2.0, 1.0, 0.5)


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
    measure: Callable[[int], BatchTime],
    batch_sizes: Sequence[int],
    free_memory: Callable[[], None],
    say: Callable[[str], None],
) -> list[BatchTime]:
    """The times of the batch sizes, ascending; a size too large for the memory is halved until one fits."""
    measured: dict[int, BatchTime] = {}
    waiting = sorted(set(batch_sizes))
    while waiting:
        batch_size = waiting.pop(0)
        try:
            measured[batch_size] = measure(batch_size)
            continue
        except (torch.OutOfMemoryError, MemoryError):
            pass  # freed outside: the exception holds on to what the failed batch had allocated
        free_memory()
        half = batch_size // 2
        waiting = [half] if half > max(measured, default=0) else []
        say(
            f"batch {batch_size} does not fit into the memory; "
            + (f"going on with {half}" if waiting else "that ends the sweep")
        )
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
    """Give back what no tensor uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class ServerMeasurer:
    """Measures settings, each with a TorchServe of its own; ends the last one on leaving.

    On a GPU another number of workers is scaled without a new start, where that gives what a start would.
    On a CPU it is not: a worker takes its share of the cores when it loads.

    environment: variables for the servers.
    """

    def __init__(
        self,
        archive: Path,
        load: Load,
        budget_ms: float,
        say: Callable[[str], None],
        can_scale: bool = torch.cuda.is_available(),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._archive = archive
        self._environment = environment
        self._load = load
        self._budget_ms = budget_ms
        self._say = say
        self._can_scale = can_scale
        self._stack = contextlib.ExitStack()
        self._served: tuple[BatchingSetting, ServedModel] | None = None

    def __enter__(self) -> ServerMeasurer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, setting: BatchingSetting) -> Measurement:
        """The highest rate of the closed loops within the budget; else the one of lowest p99."""
        try:
            served = self._serve(setting)
        except ServerStartError as error:
            # Too many workers or too large a batch for the memory; the others can still be tried.
            self._stop()
            self._say(f"{setting}: does not start ({str(error).splitlines()[-1]})")
            return Measurement(0.0, float("inf"), float("inf"), errors=1)
        best: Measurement | None = None
        for rounds in ROUNDS_IN_FLIGHT:
            connections = max(1, round(rounds * setting.batch_size * setting.workers))
            measured = self._measure(served, connections)
            if best is None or measured.meets(self._budget_ms) or measured.p99_ms < best.p99_ms:
                best = measured
            if measured.meets(self._budget_ms):
                break
        assert best is not None
        self._say(
            f"{setting}: {best.requests_per_s:.1f}/s, p50 {best.p50_ms:.1f} ms, p99 {best.p99_ms:.1f} ms, "
            f"{best.errors} errors at concurrency {best.concurrency}"
            + ("" if best.meets(self._budget_ms) else " (over the budget)")
        )
        return best

    def _measure(self, served: ServedModel, connections: int) -> Measurement:
        result = generate_load(replace(self._load, url=served.predictions_url, connections=connections))
        latencies = result.percentiles_ms
        return Measurement(
            result.requests_per_s, latencies["p50"], latencies["p99"], result.errors, connections
        )

    def _serve(self, setting: BatchingSetting) -> ServedModel:
        if self._served is not None:
            current, served = self._served
            if current == setting:
                return served
            if self._can_scale and _scales_into(current, setting):
                scale_workers(served.management_url, served.model_name, setting.workers)
                self._served = (setting, served)
                return served
        self._stop()
        served = self._stack.enter_context(serve_with_setting(self._archive, setting, self._environment))
        self._served = (setting, served)
        return served

    def _stop(self) -> None:
        self._served = None
        self._stack.close()


def _scales_into(current: BatchingSetting, setting: BatchingSetting) -> bool:
    """Whether scaling the workers of a running server makes it what the setting would start.

    The length of the queue, and by `cuda_sync` how a worker waits, are settled at the start.
    """
    cores = len(os.sched_getaffinity(0))
    return (
        replace(current, workers=setting.workers) == setting
        and current.model_settings()["jobQueueSize"] == setting.model_settings()["jobQueueSize"]
        and (2 * current.workers > cores) == (2 * setting.workers > cores)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep, search, write the recommendation."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (LoadError, ServerStartError, MpsError, FileNotFoundError, requests.RequestException) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1


def _say(message: str) -> None:
    print(f"  {message}", flush=True)


def _run(arguments: argparse.Namespace) -> int:
    images = read_images(arguments.images)
    facts = {"mps": arguments.mps, **environment()}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows: list[dict[str, Any]] = []
    batch_sizes = sorted(set(arguments.batch_sizes))
    if not arguments.no_sweep:
        times = _sweep(arguments, images, batch_sizes)
        rows += [{"step": "sweep", **time._asdict(), "images_per_s": time.images_per_s} for time in times]
        if not times:
            print("tune: not even one image fits into the memory", file=sys.stderr)
            return 1
        # A batch that computes for longer than the budget cannot answer within it.
        in_time = [time for time in times if time.detector_s * 1e3 <= arguments.p99_ms] or times[:1]
        batch_sizes = [time.batch_size for time in in_time]
    if not arguments.sweep_only:
        space = SearchSpace(batch_sizes, sorted(set(arguments.delays)), sorted(set(arguments.workers)))
        result = _search(arguments, images, space)
        rows += [
            {"step": "search", **asdict(setting), **asdict(measured), "chosen": setting == result.best}
            for setting, measured in result.trials.items()
            if measured.p99_ms < float("inf")
        ]
        _recommend(arguments, result, space)
    if arguments.json:
        append_json_rows(arguments.json, rows, {"p99_budget_ms": arguments.p99_ms, **facts})
    return 0


def _sweep(
    arguments: argparse.Namespace, images: Sequence[bytes], batch_sizes: Sequence[int]
) -> list[BatchTime]:
    device = torch.device(arguments.device)
    print(f"batch sizes in this process, on {device}:")

    def measure(batch_size: int) -> BatchTime:
        free_device_memory()
        return measure_batch(arguments.archive, images, device, batch_size)

    times = sweep_batch_sizes(measure, batch_sizes, free_device_memory, _say)
    free_device_memory()
    if times:
        print(
            format_table(
                [
                    {
                        "batch": time.batch_size,
                        "network_ms": time.network_s * 1e3,
                        "network_per_s": time.batch_size / time.network_s,
                        "detector_ms": time.detector_s * 1e3,
                        "detector_per_s": time.images_per_s,
                        "peak_mib": time.peak_memory_bytes and time.peak_memory_bytes / 2**20,
                    }
                    for time in times
                ],
                {
                    "batch": ("batch", "d"),
                    "network_ms": ("network ms", ".2f"),
                    "network_per_s": ("images/s", ".1f"),
                    "detector_ms": ("detector ms", ".2f"),
                    "detector_per_s": ("images/s", ".1f"),
                    "peak_mib": ("peak MiB", ".0f"),
                },
            )
        )
        print(
            f"recommended without a server: batch {recommended_batch_size(times)}, the smallest within "
            f"{WITHIN:.0%} of the best rate"
        )
    return times


def _search(arguments: argparse.Namespace, images: Sequence[bytes], space: SearchSpace) -> SearchResult:
    load = Load(
        "",
        images,
        connections=1,
        warm_up_s=arguments.warm_up,
        duration_s=arguments.duration,
        timeout_s=arguments.timeout,
    )
    print(f"settings with the server, p99 at most {arguments.p99_ms:g} ms:")
    with (
        cuda_mps(arguments.mps) as variables,
        ServerMeasurer(arguments.archive, load, arguments.p99_ms, _say, environment=variables) as measure,
    ):
        result = find_setting(measure, space, arguments.p99_ms)
    grid = len(space.batch_sizes) * len(space.delays_ms) * len(space.workers)
    print(f"{len(result.trials)} settings tried of {grid}")
    return result


def _recommend(arguments: argparse.Namespace, result: SearchResult, space: SearchSpace) -> None:
    assert result.best is not None
    best, measured = result.best, result.best_measurement()
    verdict = "recommended" if measured.meets(arguments.p99_ms) else "nothing meets the budget; the closest"
    print(
        f"{verdict}: {best}: {measured.requests_per_s:.1f}/s, p50 {measured.p50_ms:.1f} ms, "
        f"p99 {measured.p99_ms:.1f} ms at concurrency {measured.concurrency}"
    )
    template = HANDLER_DIR / "model-config.yaml"
    arguments.write.parent.mkdir(parents=True, exist_ok=True)
    arguments.write.write_text(settings_text_with(template.read_text(), best))
    print(f"written to {arguments.write}")
    if arguments.plot:
        _plot(arguments.plot, result, space, arguments.p99_ms)


def _plot(path: Path, result: SearchResult, space: SearchSpace, budget_ms: float) -> None:
    assert result.best is not None
    points = {
        setting: RatePoint(
            measured.requests_per_s,
            measured.p50_ms,
            measured.p99_ms,
            f"{setting.batch_size}/{setting.delay_ms}",
        )
        for setting, measured in result.trials.items()
        if measured.p99_ms < float("inf")
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
    root = PROJECT_DIR
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, default=DEMO_ARCHIVE)
    parser.add_argument(
        "--p99-ms",
        type=positive_seconds,
        default=100.0,
        metavar="MS",
        help="the latency budget (%(default)s)",
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive_int, default=[1, 2, 4, 8, 16, 32, 64], metavar="N"
    )
    parser.add_argument("--delays", nargs="+", type=positive_int, default=[1, 2, 5, 10, 20], metavar="MS")
    parser.add_argument("--workers", nargs="+", type=positive_int, default=[1, 2, 3, 4], metavar="N")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the sweep"
    )
    parser.add_argument("--mps", action="store_true", help="workers share a GPU by NVIDIA MPS")
    parser.add_argument("--duration", type=positive_seconds, default=5.0, metavar="S", help="of each load")
    parser.add_argument("--warm-up", type=positive_seconds, default=1.5, metavar="S")
    parser.add_argument("--timeout", type=positive_seconds, default=10.0, metavar="S", help="of each request")
    parser.add_argument("--images", type=Path, default=SAMPLE_IMAGES, help="folder of JPEG files")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--sweep-only", action="store_true", help="stop after the sweep in this process")
    only.add_argument("--no-sweep", action="store_true", help="search with the server alone")
    parser.add_argument(
        "--write",
        type=Path,
        default=root / "output" / "model-config.yaml",
        help="gets the recommended settings (%(default)s)",
    )
    parser.add_argument("--plot", type=Path, help="PNG of p99 against throughput with the chosen setting")
    parser.add_argument("--json", type=Path, help="file that gets one JSON row a measurement")
    return parser


if __name__ == "__main__":
    sys.exit(main())
