"""Requests a second and latencies of a server, beside the two limits that it can come close to.

    python scripts/benchmark_server.py --archive model_store/damoyolo.mar --batch-size 32 --workers 2
    python scripts/benchmark_server.py --url http://127.0.0.1:8080 --concurrency 1 64

With --archive it starts a TorchServe of its own on free ports, with the batching settings given in place of
the archive's. Closed loops by --concurrency; open loops by --rates, or by --rate-shares of the best closed
loop. The limits: --limit-network, the bare network without a server at the same batch size ("measure", or a
known number of images/s), and --limit-empty, the same server under the same load with a handler that does
nothing.
wrk (--wrk) is a second opinion on the closed loops; --perf-analyzer prints the command for NVIDIA's tool.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import requests
import torch

from lib.archive.members import BatchingSetting, batching_of, read_settings
from lib.archive.reader import load_detector
from lib.cli import fraction, positive_int, positive_seconds
from lib.images import read_images
from lib.load.external import perf_analyzer_command, run_wrk, write_perf_analyzer_input
from lib.load.generator import Load, LoadError, default_processes, generate_load
from lib.measure.calls import batch_seconds
from lib.measure.environment import environment
from lib.measure.plots import RatePoint, plot_latency_against_throughput
from lib.measure.timing import append_json_rows, format_table
from lib.paths import SAMPLE_IMAGES
from lib.server.metrics import CounterWindow, UtilisationSampler, describe_model
from lib.server.mps import MpsError, cuda_mps
from lib.server.process import ServerStartError
from lib.server.served_archive import ServedModel, serve_empty, serve_with_setting

Row = dict[str, Any]
GENERATOR_BUSY_SHARE = 0.9  # above, the figures are those of the generator

COLUMNS = {
    "load": ("load", ""),
    "requests_per_s": ("requests/s", ".1f"),
    "p50_ms": ("p50 ms", ".2f"),
    "p90_ms": ("p90 ms", ".2f"),
    "p99_ms": ("p99 ms", ".2f"),
    "p99.9_ms": ("p99.9 ms", ".2f"),
    "max_ms": ("max ms", ".2f"),
    "errors": ("errors", "d"),
    "mean_batch_size": ("batch", ".2f"),
    "gpu_percent": ("GPU %", ".0f"),
    "busy_cores": ("cores", ".1f"),
    "generator_busy_share": ("generator", ".0%"),
    "of_network": ("of network", ".1%"),
    "of_empty": ("of empty", ".1%"),
}


@dataclass(frozen=True)
class LoadPlan:
    """The loads to put on a server: `base` with each concurrency, then each rate, then each share.

    rate_shares: of the highest rate that a closed loop reached.
    """

    base: Load
    concurrencies: Sequence[int]
    rates_per_s: Sequence[float] = ()
    rate_shares: Sequence[float] = ()


def measure_load(served: ServedModel, load: Load, name: str) -> Row:
    """What the server makes of one load, with what it and the machine tell meanwhile."""
    with (
        CounterWindow(served.metrics_url, served.model_name) as counters,
        UtilisationSampler() as utilisation,
    ):
        result = generate_load(load)
    return {
        "load": name,
        "connections": load.connections,
        "rate_per_s": load.rate_per_s,
        **result.row(),
        "mean_batch_size": counters.mean_batch_size,
        "stage_ms": counters.stage_ms,
        "gpu_percent": utilisation.gpu_percent(result.window_s),
        "busy_cores": utilisation.busy_cores(result.window_s),
    }


def measure_plan(
    served: ServedModel, plan: LoadPlan, report: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """One row a load of the plan; `report` gets each as it is measured."""
    base = replace(plan.base, url=served.predictions_url)
    rows: list[Row] = []

    def measure(load: Load, name: str) -> None:
        rows.append(measure_load(served, load, name))
        report(rows[-1])

    for concurrency in plan.concurrencies:
        measure(replace(base, connections=concurrency, rate_per_s=None), f"closed {concurrency}")
    best = best_rate(rows)
    rates = [(rate, f"open {rate:g}/s") for rate in plan.rates_per_s]
    rates += [
        (share * best, f"open {share:.0%} = {share * best:.0f}/s") for share in plan.rate_shares if best
    ]
    for rate_per_s, name in rates:
        # Enough connections that the server, not their number, bounds what waits.
        connections = max(base.connections, *plan.concurrencies, 64)
        measure(replace(base, connections=connections, rate_per_s=rate_per_s), name)
    return rows


def best_rate(rows: Sequence[Row]) -> float:
    """The highest rate of the closed loops without an error; 0 where there is none."""
    return max(
        (row["requests_per_s"] for row in rows if row["rate_per_s"] is None and not row["errors"]),
        default=0.0,
    )


def network_rate(archive: Path, images: Sequence[bytes], batch_size: int, device: str) -> float:
    """Images a second of the bare network, measured in a process of its own, whose memory is then free."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_network_rate, archive, images, batch_size, device).result()


def _network_rate(archive: Path, images: Sequence[bytes], batch_size: int, device: str) -> float:
    sizes = BatchingSetting(batch_size, 1, 1).serving_settings()
    detector = load_detector(archive, torch.device(device), **sizes)
    try:
        return batch_size / batch_seconds(detector, images, batch_size)[0]
    finally:
        detector.close()


def measure_empty(
    archive: Path, setting: BatchingSetting, answer_bytes: int, plan: LoadPlan, with_wrk: bool
) -> list[Row]:
    """Rows of the empty handler, whose answers have so many bytes, under the closed loops of the plan."""
    with serve_empty(archive, setting, answer_bytes) as served:
        rows = measure_plan(served, replace(plan, rates_per_s=(), rate_shares=()))
        if with_wrk:
            rows += measure_with_wrk(served, plan)
    return [{**row, "load": f"empty, {row['load']}", "mean_batch_size": None} for row in rows]


def measure_with_wrk(served: ServedModel, plan: LoadPlan) -> list[Row]:
    """The closed loops of the plan by wrk."""
    base = plan.base
    rows = []
    for concurrency in plan.concurrencies:
        result = run_wrk(
            served.predictions_url,
            base.bodies,
            concurrency,
            duration_s=max(1, round(base.duration_s)),
            threads=base.processes or default_processes(),
        )
        rows.append(
            {"load": f"wrk {concurrency}", "connections": concurrency, "rate_per_s": None, **result.row()}
        )
    return rows


def add_limits(rows: Sequence[Row], network_per_s: float | None, empty_per_s: Mapping[int, float]) -> None:
    """Add to each row its ratio to the network alone and to the empty handler at the same concurrency."""
    for row in rows:
        row["network_per_s"] = network_per_s
        row["of_network"] = row["requests_per_s"] / network_per_s if network_per_s else None
        ceiling = empty_per_s.get(row["connections"]) if row["rate_per_s"] is None else None
        row["empty_per_s"] = ceiling
        row["of_empty"] = row["requests_per_s"] / ceiling if ceiling else None


def warnings_about(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table has to know."""
    warnings = [
        f"{row['load']}: the load generator was busy for {row['generator_busy_share']:.0%} of the time and "
        "may have been the limit; give it more --processes"
        for row in rows
        if (row["generator_busy_share"] or 0.0) > GENERATOR_BUSY_SHARE
    ]
    warnings += [
        f"{row['load']}: statuses {row['statuses']}, connection errors {row['connection_errors']}, "
        f"timeouts {row['timeouts']}, dropped {row['dropped']}"
        for row in rows
        if row["errors"]
    ]
    return warnings


@contextlib.contextmanager
def _served(arguments: argparse.Namespace, setting: BatchingSetting | None) -> Iterator[ServedModel]:
    """The server to measure: the running one, or one of its own."""
    if arguments.url:
        yield ServedModel(
            arguments.url.rstrip("/"),
            arguments.management_url.rstrip("/"),
            arguments.metrics_url.rstrip("/"),
            arguments.model,
        )
        return
    assert setting is not None
    print(f"starting TorchServe with {arguments.archive}, {setting}", flush=True)
    with (
        cuda_mps(arguments.mps) as environment,
        serve_with_setting(arguments.archive, setting, environment) as served,
    ):
        yield served


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, append JSON, draw."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (LoadError, ServerStartError, MpsError, FileNotFoundError, requests.RequestException) as error:
        print(f"benchmark_server: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.archive and (arguments.limit_empty or arguments.limit_network == "measure"):
        print("benchmark_server: --limit-empty and --limit-network measure need --archive", file=sys.stderr)
        return 2
    if arguments.mps and not arguments.archive:
        print("benchmark_server: --mps needs --archive: a running server has it or not", file=sys.stderr)
        return 2
    images = read_images(arguments.images)
    setting = None
    if arguments.archive:
        own = batching_of(read_settings(arguments.archive))
        setting = BatchingSetting(
            arguments.batch_size or own.batch_size,
            arguments.max_batch_delay or own.delay_ms,
            arguments.workers or own.workers,
        )
    load = Load(
        "",
        images,
        connections=1,
        poisson=arguments.arrivals == "poisson",
        warm_up_s=arguments.warm_up,
        duration_s=arguments.duration,
        timeout_s=arguments.timeout,
        processes=arguments.processes,
    )
    plan = LoadPlan(load, arguments.concurrency, arguments.rates, arguments.rate_shares)
    network_per_s = arguments.limit_network
    if network_per_s == "measure" and setting is not None:
        network_per_s = network_rate(arguments.archive, images, setting.batch_size, arguments.device)
        print(f"network alone: {network_per_s:.1f} images/s at batch {setting.batch_size}", flush=True)

    def report(row: Row) -> None:
        print(f"  {row['load']}: {row['requests_per_s']:.1f}/s, {row['errors']} errors", flush=True)

    with _served(arguments, setting) as served:
        knobs = describe_model(served.management_url, served.model_name)
        if arguments.perf_analyzer:
            files = sorted(arguments.images.glob("*.jpg"))
            data = write_perf_analyzer_input(files, arguments.perf_analyzer)
            command = perf_analyzer_command(
                served.inference_url, served.model_name, data, max(plan.concurrencies)
            )
            print(f"for perf_analyzer (not run here): {shlex.join(command)}", flush=True)
        rows = measure_plan(served, plan, report)
        wrk_rows = measure_with_wrk(served, plan) if arguments.wrk else []
    empty_rows: list[Row] = []
    if arguments.limit_empty and setting is not None:
        answer_bytes = round(max(row["mean_answer_bytes"] for row in rows))
        empty_rows = measure_empty(arguments.archive, setting, answer_bytes, plan, arguments.wrk)
    empty_per_s: dict[int, float] = {}
    for row in empty_rows:
        if not row["errors"]:
            known = empty_per_s.get(row["connections"], 0.0)
            empty_per_s[row["connections"]] = max(known, row["requests_per_s"])
    add_limits(rows, network_per_s, empty_per_s)
    all_rows = rows + wrk_rows + empty_rows

    facts = {
        **knobs,
        "mps": arguments.mps,
        "images": len(images),
        "mean_image_bytes": sum(map(len, images)) / len(images),
        "arrivals": arguments.arrivals,
        "warm_up_s": load.warm_up_s,
        "duration_s": load.duration_s,
        "timeout_s": load.timeout_s,
        "generator_processes": load.processes or default_processes(),
        "torchserve": metadata.version("torchserve"),
        **environment(),
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(format_table(all_rows, COLUMNS))
    for warning in warnings_about(all_rows):
        print(f"note: {warning}")
    if arguments.json:
        append_json_rows(arguments.json, all_rows, facts)
    if arguments.plot:
        _plot(arguments.plot, rows, knobs, network_per_s, empty_per_s)
    return 0


def _plot(
    path: Path,
    rows: Sequence[Row],
    knobs: dict[str, Any],
    network_per_s: float | None,
    empty_per_s: dict[int, float],
) -> None:
    series = {
        name: [
            RatePoint(row["requests_per_s"], row["p50_ms"], row["p99_ms"], row["load"].split()[1])
            for row in rows
            if (row["rate_per_s"] is None) == closed and row["p99_ms"] is not None
        ]
        for name, closed in (("closed loop", True), ("open loop", False))
    }
    limits = {} if network_per_s is None else {"network alone": network_per_s}
    if empty_per_s:
        limits["empty handler"] = max(empty_per_s.values())
    title = f"batch {knobs['batch_size']}, delay {knobs['delay_ms']} ms, workers {knobs['workers']}"
    plot_latency_against_throughput(
        path, {name: points for name, points in series.items() if points}, title, limits_per_s=limits
    )


def _network_limit(text: str) -> float | str:
    return text if text == "measure" else positive_seconds(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="inference address of a running server, say http://127.0.0.1:8080")
    source.add_argument("--archive", type=Path, help="start a server with this .mar")
    parser.add_argument("--management-url", default="http://127.0.0.1:8081", help="with --url")
    parser.add_argument("--metrics-url", default="http://127.0.0.1:8082", help="with --url")
    parser.add_argument("--model", default="damoyolo", help="with --url: name of the model")
    parser.add_argument("--batch-size", type=positive_int, help="with --archive (default: the archive's)")
    parser.add_argument("--max-batch-delay", type=positive_int, metavar="MS", help="with --archive")
    parser.add_argument("--workers", type=positive_int, help="with --archive")
    parser.add_argument(
        "--mps", action="store_true", help="with --archive: workers share a GPU by NVIDIA MPS"
    )
    parser.add_argument(
        "--concurrency", nargs="+", type=positive_int, default=[1, 8, 32, 64, 128], metavar="N"
    )
    parser.add_argument("--rates", nargs="+", type=positive_seconds, default=[], metavar="PER_S")
    parser.add_argument(
        "--rate-shares",
        nargs="+",
        type=fraction,
        default=[],
        metavar="SHARE",
        help="open loops at this share of the best closed loop, say 0.7",
    )
    parser.add_argument("--arrivals", choices=["poisson", "uniform"], default="poisson", help="of open loops")
    parser.add_argument("--duration", type=positive_seconds, default=10.0, metavar="S")
    parser.add_argument("--warm-up", type=positive_seconds, default=2.0, metavar="S")
    parser.add_argument("--timeout", type=positive_seconds, default=30.0, metavar="S", help="of each request")
    parser.add_argument(
        "--processes", type=positive_int, default=0, help="of the generator (default: a quarter of the cores)"
    )
    parser.add_argument("--images", type=Path, default=SAMPLE_IMAGES, help="folder of JPEG files")
    parser.add_argument(
        "--limit-network", type=_network_limit, metavar="RATE", help='"measure", or known images/s'
    )
    parser.add_argument("--limit-empty", action="store_true", help="measure the empty handler too")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the limit"
    )
    parser.add_argument("--wrk", action="store_true", help="measure the closed loops with wrk too")
    parser.add_argument(
        "--perf-analyzer", type=Path, metavar="FILE", help="write its input file and print its command"
    )
    parser.add_argument("--json", type=Path, help="file that gets one JSON row a measurement")
    parser.add_argument("--plot", type=Path, help="PNG of latency against throughput")
    return parser


if __name__ == "__main__":
    sys.exit(main())
