"""Measure requests/s and latencies of a server, beside the two limits that it can come close to.

    python scripts/benchmark_server.py --archive model_store/damoyolo.mar --batch-size 32 --workers 2
    python scripts/benchmark_server.py --url http://127.0.0.1:8080 --concurrency 1 64

With --archive it starts its own TorchServe on free ports, with the given batching settings in place of the
archive's. Closed loops by --concurrency; open loops by --rates, or by --rate-shares of the best closed loop.
The limits: --limit-network, the bare network without a server at the same batch size ("measure", or a known
number of images/s), and --limit-empty, the same server under the same load with a handler that does nothing.

    python scripts/benchmark_server.py --archive model_store/damoyolo.mar --gpus 1 2 2 1 --workers 8 --mps

With --gpus each number of GPUs gets a server of its own, in this order; a number may come several times. Then
--workers, --concurrency, --rates and --processes are per GPU: two GPUs get twice of each.

Prints a line for each load as it is measured, and then a table of all. --jsonl gets its line at once, too,
without the ratios to what is measured later (the empty handler, one GPU).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import (
    DEFAULT_URL,
    add_management_url,
    add_metrics_url,
    add_model,
    command_parser,
    fraction,
    positive_int,
    positive_number,
    run_command,
)
from lib.paths import SAMPLE_IMAGES

if TYPE_CHECKING:
    from lib.archive.members import BatchingSetting
    from lib.load.worker import Load
    from lib.measure.served_load import LoadPlan, Row
    from lib.server.served_archive import ServedModel

COLUMNS = {
    "gpus": ("GPUs", "d"),
    "placement": ("workers", ""),
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
    "generator_cores": ("its cores", ".1f"),
    "of_network": ("of network", ".1%"),
    "of_empty": ("of empty", ".1%"),
    "of_one_gpu": ("of 1 GPU", ".2f"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, append JSON, draw."""
    parser = _parser()
    return run_command(lambda arguments: _run(parser, arguments), parser, argv)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not arguments.archive and (arguments.limit_empty or arguments.limit_network == "measure"):
        parser.error("--limit-empty and --limit-network measure need --archive")
    if arguments.gpus and not arguments.archive:
        parser.error("--gpus needs --archive: the GPUs of a running server are settled")
    if arguments.mps and not arguments.archive:
        parser.error("--mps needs --archive: a running server has it or not")

    from lib.images import read_images
    from lib.load.worker import Load
    from lib.measure.served_load import (
        LoadPlan,
        add_empty_limit,
        add_network_limit,
        add_scaling,
        network_rate,
    )
    from lib.measure.timing import append_json_rows
    from lib.server.gpus import first_gpus

    for gpus in arguments.gpus:
        first_gpus(gpus)  # refuses before anything is measured
    images = read_images(arguments.images)
    setting = _batching_setting(arguments)
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
    facts = _facts(arguments, load)

    def record(row: Row) -> None:
        if not arguments.quiet:
            _report(row)
        if arguments.jsonl:
            append_json_rows(arguments.jsonl, [row], facts)

    def measured(row: Row) -> None:
        add_network_limit(row, network_per_s)
        record(row)

    rows = [
        row for gpus in arguments.gpus or [None] for row in _measure(arguments, setting, plan, gpus, measured)
    ]
    empty_rows: list[Row] = []
    if arguments.limit_empty and setting is not None:
        answer_bytes = round(max(row["mean_answer_bytes"] for row in rows))
        for gpus in sorted(set(arguments.gpus)) or [None]:
            empty_rows += _measure(arguments, setting, plan, gpus, record, answer_bytes)
    add_empty_limit(rows, empty_rows)
    if arguments.gpus:
        add_scaling(rows)
        add_scaling(empty_rows)
    _show(rows + empty_rows, facts)
    if arguments.plot:
        _plot(arguments.plot, rows)


def _measure(
    arguments: argparse.Namespace,
    setting: BatchingSetting | None,
    plan: LoadPlan,
    gpus: int | None,
    measured: Callable[[Row], None],
    empty_answer_bytes: int | None = None,
) -> list[Row]:
    """The rows of one server; `measured` gets each as it is measured.

    setting, plan: for one GPU; None of `gpus` is all, with settings as they are.
    empty_answer_bytes: measure the empty handler, with answers of this size, under the closed loops instead.
    """
    from lib.measure.served_load import measure_plan

    if gpus is not None and setting is not None:
        setting, plan = replace(setting, workers=gpus * setting.workers), plan.for_gpus(gpus)
    of_empty: Row = {}
    if empty_answer_bytes is not None:
        plan = replace(plan, rates_per_s=(), rate_shares=())
        of_empty = {"mean_batch_size": None}
    rows: list[Row] = []
    with _served(arguments, setting, gpus, empty_answer_bytes) as served:
        batching = served.batching()
        # "8+8": so many workers on each GPU.
        placement = "+".join(map(str, batching["workers_per_gpu"].values())) or str(batching["workers"])

        def add(row: Row) -> None:
            name = row["load"] if empty_answer_bytes is None else f"empty, {row['load']}"
            rows.append({**row, "load": name, **of_empty, **batching, "placement": placement, "gpus": gpus})
            measured(rows[-1])

        measure_plan(served, plan, add)
    return rows


def _batching_setting(arguments: argparse.Namespace) -> BatchingSetting | None:
    """The setting to serve with: the archive's, with what the options replace; None with --url."""
    from lib.archive.members import batching_of, read_settings, setting_with

    if not arguments.archive:
        return None
    own = batching_of(read_settings(arguments.archive))
    return setting_with(own, arguments.batch_size, arguments.max_batch_delay, arguments.workers)


@contextlib.contextmanager
def _served(
    arguments: argparse.Namespace,
    setting: BatchingSetting | None,
    gpus: int | None,
    empty_answer_bytes: int | None,
) -> Iterator[ServedModel]:
    """The server to measure: the running one, or its own."""
    from lib.server.gpus import gpu_environment
    from lib.server.served_archive import ServedModel, serve_empty, serve_with_setting

    if setting is None:
        yield ServedModel(
            arguments.url.rstrip("/"),
            arguments.management_url.rstrip("/"),
            arguments.metrics_url.rstrip("/"),
            arguments.model,
        )
        return
    on = "" if gpus is None else f", GPUs {gpus}"
    if empty_answer_bytes is not None:
        print(f"starting TorchServe with the empty handler, {setting}{on}", flush=True)
        with (
            gpu_environment(gpus, mps=False) as environment,
            serve_empty(arguments.archive, setting, empty_answer_bytes, environment) as served,
        ):
            yield served
        return
    print(f"starting TorchServe with {arguments.archive}, {setting}{on}", flush=True)
    with (
        gpu_environment(gpus, arguments.mps) as environment,
        serve_with_setting(arguments.archive, setting, environment) as served,
    ):
        yield served


def _report(row: Row) -> None:
    latencies = ", ".join(
        f"{name} {row[f'{name}_ms']:.1f}" for name in ("p50", "p99") if row[f"{name}_ms"] is not None
    )
    print(
        f"  {row['load']}: {row['requests_per_s']:.1f}/s, {row['errors']} errors, {latencies} ms", flush=True
    )


def _facts(arguments: argparse.Namespace, load: Load) -> dict[str, Any]:
    """What all rows have in common."""
    from lib.load.generator import default_processes
    from lib.measure.environment import environment

    return {
        "mps": arguments.mps,
        "images": len(load.bodies),
        "mean_image_bytes": sum(map(len, load.bodies)) / len(load.bodies),
        "arrivals": arguments.arrivals,
        "warm_up_s": load.warm_up_s,
        "duration_s": load.duration_s,
        "timeout_s": load.timeout_s,
        "generator_processes": load.processes or default_processes(),
        "torchserve": metadata.version("torchserve"),
        **environment(),
    }


def _show(rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Print the table."""
    from lib.measure.served_load import warnings_about
    from lib.measure.timing import format_table

    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(format_table(rows, COLUMNS))
    for warning in warnings_about(rows):
        print(f"note: {warning}")


def _plot(path: Path, rows: Sequence[Row]) -> None:
    from lib.measure.plots import RatePoint, plot_latency_against_throughput

    series: dict[str, list[RatePoint]] = {}
    for row in rows:
        loop = "closed loop" if row["rate_per_s"] is None else "open loop"
        name = loop if row["gpus"] is None else f"GPUs {row['gpus']}, {loop}"
        if row["p99_ms"] is not None:
            point = RatePoint(row["requests_per_s"], row["p50_ms"], row["p99_ms"], row["load"].split()[1])
            series.setdefault(name, []).append(point)
    limits = {
        name if row["gpus"] is None else f"{name}, GPUs {row['gpus']}": row[key]
        for row in rows
        for name, key in (("network alone", "network_per_s"), ("empty handler", "empty_per_s"))
        if row[key] is not None
    }
    workers = ", ".join(str(workers) for workers in dict.fromkeys(row["workers"] for row in rows))
    title = f"batch {rows[0]['batch_size']}, delay {rows[0]['delay_ms']} ms, workers {workers}"
    plot_latency_against_throughput(path, series, title, limits_per_s=limits)


def _network_limit(text: str) -> float | str:
    return text if text == "measure" else positive_number(text)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, renamed_options={"--pictures": "--images", "--json": "--jsonl"})
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", metavar="URL", help=f"inference port of a running server, say {DEFAULT_URL}")
    source.add_argument("--archive", type=Path, metavar="MAR", help="start a server with this archive")

    group = parser.add_argument_group("with --url")
    add_management_url(group)
    add_metrics_url(group)
    add_model(group)

    add = parser.add_argument_group("with --archive (defaults: the archive's settings)").add_argument
    add("--batch-size", type=positive_int, metavar="N")
    add("--max-batch-delay", type=positive_int, metavar="MS")
    add("--workers", type=positive_int, metavar="N")
    add("--gpus", nargs="+", type=positive_int, default=[], metavar="N", help="servers with N GPUs in turn")
    add("--mps", action="store_true", help="workers share a GPU by NVIDIA MPS")
    add("--limit-empty", action="store_true", help="measure the empty handler too")
    add("--device", help="of --limit-network measure (default: cuda where there is one)")

    add = parser.add_argument_group("load").add_argument
    add("--concurrency", nargs="+", type=positive_int, default=[1, 8, 32, 64, 128], metavar="N")
    add("--rates", nargs="+", type=positive_number, default=[], metavar="PER_S", help="open loops")
    shares = "open loops at these shares of the best closed loop, say 0.7"
    add("--rate-shares", nargs="+", type=fraction, default=[], metavar="SHARE", help=shares)
    add("--arrivals", choices=["poisson", "uniform"], default="poisson", help="of open loops (%(default)s)")
    add("--duration", type=positive_number, default=10.0, metavar="S", help="of each load (%(default)s)")
    add("--warm-up", type=positive_number, default=2.0, metavar="S", help="before each load (%(default)s)")
    add("--timeout", type=positive_number, default=30.0, metavar="S", help="of each request (%(default)s)")
    processes = "of the load generator (default: a quarter of the cores, at most 4)"
    add("--processes", type=positive_int, default=0, metavar="N", help=processes)
    add("--images", type=Path, default=SAMPLE_IMAGES, help="folder of JPEG files (%(default)s)")

    add = parser.add_argument_group("results").add_argument
    add("--limit-network", type=_network_limit, metavar="RATE", help='"measure", or known images/s')
    add("--jsonl", type=Path, metavar="FILE", help="append a line of JSON for each measurement")
    add("--plot", type=Path, metavar="FILE", help="plot latency against throughput")
    add("--quiet", action="store_true", help="print the table alone, no line for each load")
    return parser


if __name__ == "__main__":
    sys.exit(main())
