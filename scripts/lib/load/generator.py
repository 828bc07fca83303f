"""Load on an HTTP server from processes of its own: closed loop by concurrency, open loop by arrival rate.

Closed loop: every connection sends its next request when the last one is answered, which finds the highest
rate. Open loop: requests arrive at a fixed rate whether or not the server keeps up, and their latency counts
from the arrival, time without a free connection included; that is what users at that rate would see.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from lib.load.worker import WorkerStats, WorkerTask

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}
START_LEAD_S = 0.1  # until every process has read when to start
STARTUP_PATIENCE_S = 30.0


class LoadError(Exception):
    """No load could be put on the server; no figure would be right."""


@dataclass(frozen=True)
class Load:
    """What to send, and how.

    bodies: encoded images; each connection goes through them in turn, starting at one of its own.
    connections: requests in flight, in an open loop the most of them.
    rate_per_s: arrivals of an open loop; None is a closed loop. poisson: random arrivals, else evenly spaced.
    warm_up_s: load before the measurement, not counted. timeout_s: of each request, from its arrival.
    processes: 0 takes a quarter of the cores, at most 4.
    """

    url: str
    bodies: Sequence[bytes]
    connections: int
    rate_per_s: float | None = None
    poisson: bool = True
    warm_up_s: float = 2.0
    duration_s: float = 10.0
    timeout_s: float = 30.0
    processes: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class LoadResult:
    """What the requests of the measured window came to.

    requests_per_s: answers of status 200 that arrived in the window, over its length.
    percentiles_ms: of these answers and of requests given up, whose latency is at least the time limit; NaN
        where there is neither. Error answers are left out: they are quick, and would flatter.
    dropped: of an open loop, no connection became free within the time limit.
    generator_busy_share: CPU time over time of the busiest process of the generator; near 1 the figures
        measure the generator.
    window_s: start and end of the measurement on the monotonic clock.
    """

    requests_per_s: float
    percentiles_ms: dict[str, float]
    statuses: dict[int, int]
    connection_errors: dict[str, int]
    timeouts: int
    dropped: int
    mean_answer_bytes: float
    generator_busy_share: float
    window_s: tuple[float, float]

    @property
    def errors(self) -> int:
        """Requests without an answer of status 200."""
        refused = sum(count for status, count in self.statuses.items() if status != 200)
        return refused + sum(self.connection_errors.values()) + self.timeouts + self.dropped

    def row(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "requests_per_s": self.requests_per_s,
            **{f"{name}_ms": _known(value) for name, value in self.percentiles_ms.items()},
            "errors": self.errors,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "connection_errors": self.connection_errors,
            "timeouts": self.timeouts,
            "dropped": self.dropped,
            "mean_answer_bytes": _known(self.mean_answer_bytes),
            "generator_busy_share": _known(self.generator_busy_share),
        }


def generate_load(load: Load) -> LoadResult:
    """Put the load on the server, and what became of it.

    Raises:
        LoadError: the load cannot be sent at all; a server that fails or is not there shows in the result.
    """
    tasks = _tasks(load)
    scripts_dir = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", "from lib.load.worker import work; work()"]
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in tasks:
            worker = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # In place of what the caller has there: the worker needs the standard library alone.
                env={**os.environ, "PYTHONPATH": scripts_dir},
            )
            stack.callback(_end, worker)
            workers.append(worker)
        for worker, task in zip(workers, tasks, strict=True):
            _send(worker, task)
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.read(1) != b"R":
                raise LoadError("a process of the load generator did not start; its message is above")
        start_s = time.monotonic() + START_LEAD_S
        for worker in workers:
            _send(worker, start_s)
        tallies = [_receive(worker) for worker in workers]
    measured_from_s = start_s + load.warm_up_s
    return _merge(tallies, (measured_from_s, measured_from_s + load.duration_s))


def default_processes() -> int:
    """A quarter of the cores, at least 1 and at most 4: the server needs the others."""
    return min(4, max(1, len(os.sched_getaffinity(0)) // 4))


def _tasks(load: Load) -> list[WorkerTask]:
    """The share of each process."""
    if not load.bodies:
        raise LoadError("no image to send; at least one is needed")
    if load.rate_per_s is not None and load.rate_per_s <= 0:
        raise LoadError(f"the rate is {load.rate_per_s}; accepted is a number above 0")
    parts = urlsplit(load.url)
    if parts.scheme != "http" or not parts.hostname:
        raise LoadError(f"the address is {load.url!r}; accepted is http://host:port/path")
    requests = build_requests(load.url, load.bodies, load.headers)
    processes = min(load.processes or default_processes(), load.connections)
    if processes < 1:
        raise LoadError(f"{load.connections} connections; at least 1 is needed")
    generator = np.random.default_rng(load.seed)
    tasks = []
    first_connection = 0
    for index in range(processes):
        connections = load.connections // processes + (index < load.connections % processes)
        rate_per_s, first_arrival_s = None, 0.0
        if load.rate_per_s is not None:
            rate_per_s = load.rate_per_s / processes
            first_arrival_s = (
                float(generator.exponential(1 / rate_per_s)) if load.poisson else index / load.rate_per_s
            )
        tasks.append(
            WorkerTask(
                host=parts.hostname,
                port=parts.port or 80,
                requests=requests,
                connections=connections,
                first_request=first_connection,
                rate_per_s=rate_per_s,
                poisson=load.poisson,
                first_arrival_s=first_arrival_s,
                warm_up_s=load.warm_up_s,
                duration_s=load.duration_s,
                timeout_s=load.timeout_s,
                seed=load.seed * processes + index,
            )
        )
        first_connection += connections
    return tasks


def build_requests(url: str, bodies: Sequence[bytes], headers: Mapping[str, str]) -> tuple[bytes, ...]:
    """Head and body of a POST of each body."""
    parts = urlsplit(url)
    fields = {"Host": parts.netloc, "Content-Type": "application/octet-stream", **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    head = f"POST {parts.path or '/'} HTTP/1.1\r\n{lines}"
    return tuple(f"{head}Content-Length: {len(body)}\r\n\r\n".encode("ascii") + body for body in bodies)


def _send(worker: subprocess.Popen[bytes], message: WorkerTask | float) -> None:
    assert worker.stdin is not None
    try:
        pickle.dump(message, worker.stdin)
        worker.stdin.flush()
    except BrokenPipeError:
        raise LoadError("a process of the load generator ended early; its message is above") from None


def _receive(worker: subprocess.Popen[bytes]) -> WorkerStats:
    assert worker.stdout is not None
    try:
        tally: WorkerStats = pickle.load(worker.stdout)
    except EOFError:
        raise LoadError("a process of the load generator ended early; its message is above") from None
    return tally


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End the process, whatever it is doing, and what connects it with this one."""
    worker.kill()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    worker.wait(STARTUP_PATIENCE_S)


def _merge(tallies: Sequence[WorkerStats], window_s: tuple[float, float]) -> LoadResult:
    latencies_ms = np.concatenate([np.frombuffer(tally.latencies_s) for tally in tallies]) * 1e3
    statuses: Counter[int] = sum((tally.statuses for tally in tallies), Counter())
    answers = sum(tally.answers_in_window for tally in tallies)
    return LoadResult(
        requests_per_s=answers / (window_s[1] - window_s[0]),
        percentiles_ms=percentiles(latencies_ms),
        statuses=dict(statuses),
        connection_errors=dict(sum((tally.connection_errors for tally in tallies), Counter())),
        timeouts=sum(tally.timeouts for tally in tallies),
        dropped=sum(tally.dropped for tally in tallies),
        mean_answer_bytes=sum(tally.answer_bytes for tally in tallies) / max(1, statuses[200]),
        generator_busy_share=max(tally.busy_share for tally in tallies),
        window_s=window_s,
    )


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    """The values that so many per cent of them do not exceed (nearest rank); NaN of none."""
    if not values.size:
        return dict.fromkeys(PERCENTILES, math.nan)
    ordered = np.sort(values)
    # Rounded, because 99.9 % of 1000 is a little more than 999 in binary fractions.
    ranks = {name: math.ceil(round(percent / 100 * len(ordered), 6)) for name, percent in PERCENTILES.items()}
    return {name: float(ordered[rank - 1]) for name, rank in ranks.items()}
