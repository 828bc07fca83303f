"""Measure requests/s and latencies of a server, beside the two limits that it can come close to.

    python scripts/benchmark_server.py --archive model_store/damoyolo.mar --batch-size 32 --workers 2
    python scripts/benchmark_server.py --url http://127.0.0.1:8080 --concurrency 1 64

With --archive it starts its own TorchServe on free ports, with the given batching settings in place of the
archive's. Closed loops by --concurrency; open loops by --rates, or by --rate-shares of the best closed loop.
The limits: --limit-network, the bare network without a server at the same batch size ("measure", or a known
number of images/s), and --limit-empty, the same server under the same load with a handler that does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import command_parser, fraction, positive_int, positive_seconds, run_command
from lib.paths import SAMPLE_IMAGES

if TYPE_CHECKING:
    from lib.archive.members import BatchingSetting
    from lib.load.worker import Load
    from lib.measure.served_load import Row
    from lib.server.served_archive import ServedModel

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


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, append JSON, draw."""
    parser = _parser()
    return run_command(lambda arguments: _run(parser, arguments), parser, argv)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not arguments.archive and (arguments.limit_empty or arguments.limit_network == "measure"):
        parser.error("--limit-empty and --limit-network measure need --archive")
    if arguments.mps and not arguments.archive:
        parser.error("--mps needs --archive: a running server has it or not")

    from lib.images import read_images
    from lib.load.worker import Load
    from lib.measure.served_load import LoadPlan, add_limits, measure_empty, measure_plan, network_rate

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
    with _served(arguments, setting) as served:
        batching = served.batching()
        rows = measure_plan(served, plan, _report)
    empty_rows: list[Row] = []
    if arguments.limit_empty and setting is not None:
        answer_bytes = round(max(row["mean_answer_bytes"] for row in rows))
        empty_rows = measure_empty(arguments.archive, setting, answer_bytes, plan)
    empty_per_s = {row["connections"]: row["requests_per_s"] for row in empty_rows if not row["errors"]}
    add_limits(rows, network_per_s, empty_per_s)
    _show(arguments, rows + empty_rows, {**batching, **_facts(arguments, load)})
    if arguments.plot:
        _plot(arguments.plot, rows, batching, network_per_s, empty_per_s)


def _batching_setting(arguments: argparse.Namespace) -> BatchingSetting | None:
    """The setting to serve with: the archive's, with what the options replace; None with --url."""
    from lib.archive.members import BatchingSetting, batching_of, read_settings

    if not arguments.archive:
        return None
    own = batching_of(read_settings(arguments.archive))
    return BatchingSetting(
        arguments.batch_size or own.batch_size,
        arguments.max_batch_delay or own.delay_ms,
        arguments.workers or own.workers,
    )


@contextlib.contextmanager
def _served(arguments: argparse.Namespace, setting: BatchingSetting | None) -> Iterator[ServedModel]:
    """The server to measure: the running one, or its own."""
    from lib.server.mps import cuda_mps
    from lib.server.served_archive import ServedModel, serve_with_setting

    if setting is None:
        yield ServedModel(
            arguments.url.rstrip("/"),
            arguments.management_url.rstrip("/"),
            arguments.metrics_url.rstrip("/"),
            arguments.model,
        )
        return
    print(f"starting TorchServe with {arguments.archive}, {setting}", flush=True)
    with (
        cuda_mps(arguments.mps) as environment,
        serve_with_setting(arguments.archive, setting, environment) as served,
    ):
        yield served


def _report(row: Row) -> None:
    print(f"  {row['load']}: {row['requests_per_s']:.1f}/s, {row['errors']} errors", flush=True)


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


def _show(arguments: argparse.Namespace, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Print the table, and append the rows to the JSON file."""
    from lib.measure.served_load import warnings_about
    from lib.measure.timing import append_json_rows, format_table

    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(format_table(rows, COLUMNS))
    for warning in warnings_about(rows):
        print(f"note: {warning}")
    if arguments.json:
        append_json_rows(arguments.json, rows, facts)


def _plot(
    path: Path,
    rows: Sequence[Row],
    batching: Mapping[str, Any],
    network_per_s: float | None,
    empty_per_s: Mapping[int, float],
) -> None:
    from lib.measure.plots import RatePoint, plot_latency_against_throughput

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
    title = f"batch {batching['batch_size']}, delay {batching['delay_ms']} ms, workers {batching['workers']}"
    plot_latency_against_throughput(
        path, {name: points for name, points in series.items() if points}, title, limits_per_s=limits
    )


def _network_limit(text: str) -> float | str:
    return text if text == "measure" else positive_seconds(text)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, renamed_options={"--pictures": "--images"})
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="inference address of a running server, say http://127.0.0.1:8080")
    source.add_argument("--archive", type=Path, help="start a server with this .mar")

    add = parser.add_argument_group("with --url").add_argument
    add("--management-url", default="http://127.0.0.1:8081", help="management address (%(default)s)")
    add("--metrics-url", default="http://127.0.0.1:8082", help="metrics address (%(default)s)")
    add("--model", default="damoyolo", help="name of the model (%(default)s)")

    add = parser.add_argument_group("with --archive (defaults: the archive's settings)").add_argument
    add("--batch-size", type=positive_int, metavar="N")
    add("--max-batch-delay", type=positive_int, metavar="MS")
    add("--workers", type=positive_int, metavar="N")
    add("--mps", action="store_true", help="workers share a GPU by NVIDIA MPS")
    add("--limit-empty", action="store_true", help="measure the empty handler too")
    add("--device", help="of --limit-network measure (default: cuda where there is one)")

    add = parser.add_argument_group("load").add_argument
    add("--concurrency", nargs="+", type=positive_int, default=[1, 8, 32, 64, 128], metavar="N")
    add("--rates", nargs="+", type=positive_seconds, default=[], metavar="PER_S", help="open loops")
    shares = "open loops at these shares of the best closed loop, say 0.7"
    add("--rate-shares", nargs="+", type=fraction, default=[], metavar="SHARE", help=shares)
    add("--arrivals", choices=["poisson", "uniform"], default="poisson", help="of open loops (%(default)s)")
    add("--duration", type=positive_seconds, default=10.0, metavar="S", help="of each load (%(default)s)")
    add("--warm-up", type=positive_seconds, default=2.0, metavar="S", help="before each load (%(default)s)")
    add("--timeout", type=positive_seconds, default=30.0, metavar="S", help="of each request (%(default)s)")
    processes = "of the load generator (default: a quarter of the cores, at most 4)"
    add("--processes", type=positive_int, default=0, metavar="N", help=processes)
    add("--images", type=Path, default=SAMPLE_IMAGES, help="folder of JPEG files (%(default)s)")

    add = parser.add_argument_group("results").add_argument
    add("--limit-network", type=_network_limit, metavar="RATE", help='"measure", or known images/s')
    add("--json", type=Path, help="file that gets one JSON row per measurement")
    add("--plot", type=Path, help="PNG of latency against throughput")
    return parser


if __name__ == "__main__":
    sys.exit(main())
