"""Load a running server for a long time with mixed requests, and check every answer and the memory.

Sizes, formats, options and 2 % of damaged images are mixed. Every answer must equal the one that the same
archive gives in this process, and the p99 of the last minute must be at most 1.3 times that of the second.
The server must run on this machine. Ctrl-C ends the soak early; its record is written all the same.

python scripts/soak_server.py --archive model_store/damoyolo.mar --minutes 30 --plot output/soak.png
python scripts/soak_server.py --archive model_store/damoyolo.mar --minutes 8 --clients 32 --rate-share 0.8

Prints latencies of each minute, memory at start and end, and each kind of problem.
Exit code: 0 if nothing was wrong, 1 if something was, 2 if nothing could be sent, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib.cli import (
    INTERRUPTED,
    add_local_server,
    command_parser,
    ended_like_ctrl_c,
    fraction,
    positive_int,
    positive_number,
    run_command,
)
from lib.json_file import write_json
from lib.paths import SAMPLE_IMAGES

if TYPE_CHECKING:
    from lib.load.soak import SoakRecord

MAX_P99_GROWTH = 1.3
RATE_MEASURED_S = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Send the load; 0 if nothing was wrong, 1 if something was, 2 if nothing could be sent."""
    return run_command(_run, _parser(), argv, error_code=2)


def _run(arguments: argparse.Namespace) -> int:
    with ended_like_ctrl_c():
        record = _soak(arguments)
        growth = record.p99_growth()
        if growth is not None and growth > MAX_P99_GROWTH:
            record.problems["p99 grew"] += 1
        if arguments.json is not None:
            write_json(arguments.json, record.to_json())
        _print_summary(record)
        if arguments.plot is not None:
            from lib.measure.plots import plot_soak

            arguments.plot.parent.mkdir(parents=True, exist_ok=True)
            plot_soak(arguments.plot, record.latencies_by_minute(), record.memory_mb, "Soak, mixed requests")
    if record.interrupted:
        print("soak_server: interrupted; the figures are those until then", file=sys.stderr)
        return INTERRUPTED
    return 1 if record.problems else 0


def _soak(arguments: argparse.Namespace) -> SoakRecord:
    from lib.load.mixed_requests import mixed_requests
    from lib.load.soak import soak
    from lib.server.served_archive import ServedModel

    images = sorted(SAMPLE_IMAGES.glob("*.jpg"))
    mixture = mixed_requests(arguments.archive, images, arguments.requests, arguments.bad_share)
    print(f"{len(mixture)} requests prepared; sending from {arguments.clients} clients", flush=True)
    served = ServedModel(arguments.url.rstrip("/"), arguments.management_url, "", arguments.model)
    if arguments.rate_share is None:
        return soak(served, mixture, arguments.clients, arguments.minutes * 60, arguments.rate)
    measured = soak(served, mixture, arguments.clients, RATE_MEASURED_S)
    if measured.interrupted:
        return measured
    rate_per_s = arguments.rate_share * max(1, len(measured.answers)) / RATE_MEASURED_S
    print(f"{rate_per_s:.1f} requests/s, {arguments.rate_share:.0%} of what the server answers", flush=True)
    record = soak(served, mixture, arguments.clients, arguments.minutes * 60, rate_per_s)
    record.problems.update(measured.problems)
    return record


def _print_summary(record: SoakRecord) -> None:
    for minute, latency in enumerate(record.latencies_by_minute()):
        if latency is None:
            print(f"minute {minute:3}: no answer")
        else:
            print(f"minute {minute:3}: p50 {latency['p50']:8.1f} ms, p99 {latency['p99']:8.1f} ms")
    for kind, slope in record.late_slopes_mb_per_h().items():
        first, last = record.memory_mb[0][1], record.memory_mb[-1][1]
        print(f"{kind}: {first[kind]:.0f} to {last[kind]:.0f} MB; second half {slope:+.1f} MB/h")
    growth = record.p99_growth()
    if growth is not None:
        print(f"p99 of the last minute over that of the second: {growth:.2f} (at most {MAX_P99_GROWTH})")
    for problem, count in record.problems.most_common():
        print(f"{count} times: {problem}")
    print(f"{len(record.answers)} answers, {record.problems.total() or 'no'} problems", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("--archive", type=Path, required=True, help="the archive that the server has loaded")
    add_local_server(parser)
    parser.add_argument("--minutes", type=positive_number, default=30.0, help="default: %(default)s")
    parser.add_argument("--clients", type=positive_int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--requests", type=positive_int, default=200, help="different requests; default: %(default)s"
    )
    parser.add_argument(
        "--bad-share", type=fraction, default=0.02, help="damaged images; default: %(default)s"
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--rate", type=positive_number, metavar="PER_S", help="send so many a second (default: no pause)"
    )
    rate.add_argument(
        "--rate-share",
        type=positive_number,
        metavar="SHARE",
        help="send at this share of the rate that the server answers, which is measured first",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot latency and memory over time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
