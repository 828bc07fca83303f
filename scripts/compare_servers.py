"""Measure the same archive behind several servers, in one run: TorchServe, Triton, LitServe, and plain ones.

python scripts/compare_servers.py --archive model_store/damoyolo.mar --concurrency 1 16 --rounds 2

All get the same images from the same load generator, and the same batch size, delay and number of workers.
They are measured in turn, in every second round in reverse order. Each is checked first: its detections have
to be those of PyTorch in float32, within the tolerances of the archive's precision ("right"), or are the
archive's own answers byte for byte ("equal"). Where wrk is installed it repeats every measurement. A server
that is not installed, or does not start, is left out with the reason.

  torchserve               this project
  triton, litserve         the same detector behind deploy/triton and deploy/litserve
  empty                    TorchServe with a handler that does nothing: the limit of the server
  plain-litserve           LitServe as in its guide: Pillow, float32, one image at a time, all by default
  plain-litserve-batches   the same with the settings of all
  plain-torchserve         TorchServe's own object_detector handler, the same plain network

Prints a line for each measurement, then a table in Markdown. --jsonl gets each measurement at once; if the
file has some already, with the same settings, the table is over all of them. After Ctrl-C the table is over
what was measured. Exit code 1 if an answer was wrong or nothing was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import (
    INTERRUPTED,
    ScriptError,
    command_parser,
    ended_like_ctrl_c,
    name_list,
    positive_int,
    positive_number,
    run_command,
)
from lib.paths import DEMO_ARCHIVE, SAMPLE_IMAGES

if TYPE_CHECKING:
    from lib.archive.members import BatchingSetting
    from lib.load.worker import Load
    from lib.measure.server_rounds import Plan, Row

NAMES = (
    "torchserve",
    "triton",
    "litserve",
    "empty",
    "plain-litserve",
    "plain-litserve-batches",
    "plain-torchserve",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> int:
    from lib.devices import open_device
    from lib.images import read_images
    from lib.measure.reference_answers import read_reference
    from lib.measure.server_rounds import measure_rounds, summarised
    from lib.measure.timing import append_json_rows
    from lib.server.gpus import gpu_environment

    unknown = set(arguments.servers) - set(NAMES)
    if unknown:
        raise ScriptError(f"--servers has {', '.join(sorted(unknown))}; accepted are {', '.join(NAMES)}")
    device = open_device(arguments.device).type
    images = read_images(arguments.images)
    setting = _setting(arguments)
    plan = _plan(arguments, images)
    facts = _facts(arguments, setting, plan.base, device)
    rows = _earlier_rows(arguments.jsonl, facts)
    reference = read_reference(arguments.archive, images, setting, device)
    print(f"network alone: {reference.network_per_s:.1f} images/s at batch {setting.batch_size}", flush=True)
    facts["precision"] = reference.precision

    def report(row: Row) -> None:
        rows.append(row)
        if arguments.jsonl:
            append_json_rows(arguments.jsonl, [row], facts)
        if not arguments.quiet:
            print(_line(row), flush=True)

    interrupted = False
    gpus = 1 if device == "cuda" else None
    with gpu_environment(gpus, arguments.mps) as environment, ended_like_ctrl_c():
        bench = _bench(arguments, setting, device, environment, reference.texts)
        try:
            measure_rounds(bench, plan, reference, report)
        except KeyboardInterrupt:
            interrupted = True
    summary = summarised(rows)
    _show(summary, facts, arguments.json)
    if interrupted:
        print("compare_servers: interrupted; the table has what was measured before", file=sys.stderr)
        return INTERRUPTED
    return int(not any("images_per_s" in row for row in summary) or any(row.get("wrong") for row in summary))


def _setting(arguments: argparse.Namespace) -> BatchingSetting:
    """The archive's own, with what the options replace."""
    from lib.archive.members import batching_of, read_settings, setting_with

    own = batching_of(read_settings(arguments.archive))
    return setting_with(own, arguments.batch_size, arguments.max_batch_delay, arguments.workers)


def _bench(
    arguments: argparse.Namespace,
    setting: BatchingSetting,
    device: str,
    environment: dict[str, str],
    texts: Sequence[bytes],
) -> Any:
    from lib.measure.compared_servers import Bench

    answer_bytes = round(sum(map(len, texts)) / len(texts))
    return Bench(arguments.archive, setting, device, environment, answer_bytes, arguments.api_servers)


def _plan(arguments: argparse.Namespace, images: Sequence[bytes]) -> Plan:
    from lib.load.generator import default_processes
    from lib.load.worker import Load
    from lib.measure.server_rounds import Plan
    from lib.measure.wrk import find_wrk

    base = Load(
        "",
        images,
        connections=1,
        warm_up_s=arguments.warm_up,
        duration_s=arguments.duration,
        timeout_s=arguments.timeout,
        processes=arguments.processes or default_processes(),
    )
    wrk = None if arguments.no_wrk else find_wrk()
    return Plan(base, arguments.concurrency, arguments.servers, arguments.rounds, wrk)


def _facts(
    arguments: argparse.Namespace, setting: BatchingSetting, load: Load, device: str
) -> dict[str, Any]:
    """What all rows have in common."""
    from lib.measure.environment import environment

    return {
        "archive_sha256": hashlib.sha256(arguments.archive.read_bytes()).hexdigest(),
        "device": device,
        "batch_size": setting.batch_size,
        "delay_ms": setting.delay_ms,
        "workers": setting.workers,
        "api_servers": arguments.api_servers or setting.workers,
        "mps": arguments.mps,
        "images": len(load.bodies),
        "mean_image_bytes": sum(map(len, load.bodies)) / len(load.bodies),
        "warm_up_s": load.warm_up_s,
        "duration_s": load.duration_s,
        "processes": load.processes,
        **environment(),
    }


def _earlier_rows(path: Path | None, facts: dict[str, Any]) -> list[Row]:
    """The rows of the file, if they were measured under the same conditions.

    Raises:
        ScriptError: they were not.
    """
    if path is None or not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        other = {name: row.get(name) for name in facts if row.get(name) != facts[name]}
        if other:
            raise ScriptError(
                f"{path} has measurements with {other}, not { ({name: facts[name] for name in other}) }"
            )
    return rows


def _line(row: Row) -> str:
    where = f"  round {row['round'] + 1}, {row['server']}"
    if "left_out" in row:
        return f"{where}: left out: {row['left_out']}"
    latencies = ", ".join(f"{key} {row[f'{key}_ms'] or 0.0:.1f}" for key in ("p50", "p99"))
    measured = f"{row['requests_per_s']:.1f}/s, {latencies} ms, {row['errors']} errors"
    return f"{where}, {row['connections']} clients, {row['tool']}: {measured}"


def _show(summary: Sequence[Row], facts: dict[str, Any], path: Path | None) -> None:
    from lib.json_file import write_json
    from lib.measure.server_rounds import markdown_table

    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(markdown_table(summary))
    if path is not None:
        write_json(path, {"facts": facts, "summary": list(summary)})


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--archive", type=Path, default=DEMO_ARCHIVE, metavar="MAR", help="what all serve (%(default)s)")
    add("--servers", type=name_list, default=list(NAMES), metavar="A,B", help="(default: all of the above)")
    add("--rounds", type=positive_int, default=2, metavar="N", help="(%(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--mps", action="store_true", help="workers share the GPU by NVIDIA MPS")
    add = parser.add_argument_group("settings of all servers (defaults: the archive's)").add_argument
    add("--batch-size", type=positive_int, metavar="N")
    add("--max-batch-delay", type=positive_int, metavar="MS")
    add("--workers", type=positive_int, metavar="N")
    servers = "processes of LitServe that read requests (default: as many as workers)"
    add("--api-servers", type=positive_int, metavar="N", help=servers)
    add = parser.add_argument_group("load").add_argument
    add("--concurrency", nargs="+", type=positive_int, default=[1, 16], metavar="N", help="(1 16)")
    add("--duration", type=positive_number, default=10.0, metavar="S", help="of each load (%(default)s)")
    add("--warm-up", type=positive_number, default=2.0, metavar="S", help="before each load (%(default)s)")
    add("--timeout", type=positive_number, default=30.0, metavar="S", help="of each request (%(default)s)")
    processes = "of the load generator, threads of wrk (default: a quarter of the cores, at most 4)"
    add("--processes", type=positive_int, metavar="N", help=processes)
    add("--no-wrk", action="store_true", help="do not repeat the measurements with wrk")
    add("--images", type=Path, default=SAMPLE_IMAGES, metavar="DIR", help="of JPEG files (%(default)s)")
    add = parser.add_argument_group("results").add_argument
    add("--jsonl", type=Path, metavar="FILE", help="append a line of JSON for each measurement")
    add("--json", type=Path, metavar="FILE", help="the table as JSON")
    add("--quiet", action="store_true", help="print the table alone")
    return parser


if __name__ == "__main__":
    sys.exit(main())
