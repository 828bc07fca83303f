"""Put load on an HTTP server from several processes: closed loop by concurrency, open loop by arrival rate.

Closed loop: every connection sends its next request when the last one is answered, which finds the highest
rate. Open loop: requests arrive at a fixed rate whether or not the server keeps up, and their latency counts
from the arrival, including the wait for a free connection; that is what users at that rate would see.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from lib.cli import ScriptError
from lib.load.worker import Load, WorkerStats, WorkerTask

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
START_LEAD_S = 0.1  # until every process has read when to start
STARTUP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class LoadResult:
    """The measured window in figures.

    requests_per_s: answers of status 200 that arrived in the window, over its length.
    percentiles_ms: of these answers and of requests given up, whose latency is at least the time limit; NaN
        where there is neither. Error answers are left out: they are fast and would improve the figures.
    dropped: of an open loop, no connection became free within the time limit.
    generator_busy_share: CPU time over wall time of the generator's busiest process; near 1 the figures
        measure the generator. generator_cores: the sum over its processes, which the server lacks.
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
    generator_cores: float
    window_s: tuple[float, float]

    @property
    def errors(self) -> int:
        """Requests without an answer of status 200."""
        refused = sum(count for status, count in self.statuses.items() if status != 200)
        return refused + sum(self.connection_errors.values()) + self.timeouts + self.dropped

    def row(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "requests_per_s": self.requests_per_s,
            # JSON has no NaN.
            **{
                f"{name}_ms": None if math.isnan(value) else value
                for name, value in self.percentiles_ms.items()
            },
            "errors": self.errors,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "connection_errors": self.connection_errors,
            "timeouts": self.timeouts,
            "dropped": self.dropped,
            "mean_answer_bytes": self.mean_answer_bytes,
            "generator_busy_share": self.generator_busy_share,
            "generator_cores": self.generator_cores,
        }


def generate_load(load: Load) -> LoadResult:
    """Put the load on the server.

    Raises:
        ScriptError: the load cannot be sent at all; a server that fails or is not there shows in the result.
    """
    tasks = _tasks(load)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_worker()) for _ in tasks]
        for worker, task in zip(workers, tasks, strict=True):
            _send(worker, task)
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.read(1) != b"R":
                raise ScriptError("a process of the load generator did not start; its message is above")
        start_s = time.monotonic() + START_LEAD_S
        for worker in workers:
            _send(worker, start_s)
        stats = [_receive(worker) for worker in workers]
    measured_from_s = start_s + load.warm_up_s
    return _merge(stats, (measured_from_s, measured_from_s + load.duration_s))


def default_processes() -> int:
    """A quarter of the cores, at least 1 and at most 4: the server needs the others."""
    return min(4, max(1, len(os.sched_getaffinity(0)) // 4))


def _tasks(load: Load) -> list[WorkerTask]:
    """The share of each process."""
    if not load.bodies:
        raise ScriptError("no image to send; at least one is needed")
    if load.rate_per_s is not None and load.rate_per_s <= 0:
        raise ScriptError(f"the rate is {load.rate_per_s}; accepted is a number above 0")
    parts = urlsplit(load.url)
    if parts.scheme != "http" or not parts.hostname:
        raise ScriptError(f"the address is {load.url!r}; accepted is http://host:port/path")
    processes = min(load.processes or default_processes(), load.connections)
    if processes < 1:
        raise ScriptError(f"{load.connections} connections; at least 1 is needed")
    generator = np.random.default_rng(load.seed)
    tasks = []
    first_connection = 0
    for index in range(processes):
        connections = load.connections // processes + (index < load.connections % processes)
        share = replace(load, connections=connections, seed=load.seed * processes + index)
        first_arrival_s = 0.0
        if load.rate_per_s is not None:
            share = replace(share, rate_per_s=load.rate_per_s / processes)
            evenly_s = index / load.rate_per_s
            first_arrival_s = generator.exponential(processes / load.rate_per_s) if load.poisson else evenly_s
        tasks.append(WorkerTask(share, first_connection, first_arrival_s))
        first_connection += connections
    return tasks


@contextlib.contextmanager
def _worker() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for its task; killed on leaving, whatever it is doing."""
    worker = subprocess.Popen(
        [sys.executable, "-c", "from lib.load.worker import work; work()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Replaces the caller's: the worker needs the standard library alone.
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        yield worker
    finally:
        worker.kill()
        for stream in (worker.stdin, worker.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        worker.wait(STARTUP_TIMEOUT_S)


def _send(worker: subprocess.Popen[bytes], message: WorkerTask | float) -> None:
    assert worker.stdin is not None
    try:
        pickle.dump(message, worker.stdin)
        worker.stdin.flush()
    except BrokenPipeError:
        raise ScriptError("a process of the load generator ended early; its message is above") from None


def _receive(worker: subprocess.Popen[bytes]) -> WorkerStats:
    assert worker.stdout is not None
    try:
        stats: WorkerStats = pickle.load(worker.stdout)
    except EOFError:
        raise ScriptError("a process of the load generator ended early; its message is above") from None
    return stats


def _merge(stats: Sequence[WorkerStats], window_s: tuple[float, float]) -> LoadResult:
    statuses: Counter[int] = sum((each.statuses for each in stats), Counter())
    return LoadResult(
        requests_per_s=sum(each.answers_in_window for each in stats) / (window_s[1] - window_s[0]),
        percentiles_ms=percentiles(np.concatenate([np.frombuffer(each.latencies_s) for each in stats]) * 1e3),
        statuses=dict(statuses),
        connection_errors=dict(sum((each.connection_errors for each in stats), Counter())),
        timeouts=sum(each.timeouts for each in stats),
        dropped=sum(each.dropped for each in stats),
        mean_answer_bytes=sum(each.answer_bytes for each in stats) / max(1, statuses[200]),
        generator_busy_share=max(each.busy_share for each in stats),
        generator_cores=sum(each.busy_share for each in stats),
        window_s=window_s,
    )


def percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    """Percentiles that are values which occurred (nearest rank); NaN without values."""
    if not values.size:
        return dict.fromkeys(QUANTILES, math.nan)
    found = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")
    return dict(zip(QUANTILES, found.tolist(), strict=True))
