"""Load a server for a long time with mixed requests; record wrong answers, latencies and memory."""

from __future__ import annotations

import functools
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import requests

from lib.cli import ScriptError
from lib.load.generator import percentiles
from lib.load.mixed_requests import MixedRequest
from lib.server.local_http import direct_session
from lib.server.process import describe_model
from lib.server.served_archive import ServedModel

from damoyolo_client.threads import DaemonThreads

MEMORY_INTERVAL_S = 5.0
TIMEOUT_S = 120.0
MAX_EXAMPLES = 20
ABANDONED_AFTER_S = 5.0  # requests under way when the soak is interrupted
PAUSE_S = 1.0  # of a client whose request was not answered
MINUTE_S = 60.0
BYTES_PER_MB = 1e6
# Of memory_mb: requests' errors are OSError, those of values a description without process ids.
MEMORY_FAILURES = (psutil.Error, OSError, subprocess.SubprocessError, LookupError, TypeError, ValueError)


@dataclass
class SoakRecord:
    """What was seen.

    answers: (seconds since the start, latency in ms) of each. problems: what was wrong, with the number of
    times: wrong answers, requests without an answer, failed samples of the memory.
    memory_mb: (seconds since the start, resident memory in 10^6 bytes by kind: worker, java, gpu).
    examples: details of the first problems. interrupted: whether Ctrl-C ended it.
    """

    answers: list[tuple[float, float]] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    memory_mb: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    interrupted: bool = False

    def add_problem(self, problem: str) -> None:
        """Count a problem; what is in brackets is detail. Nothing is counted for an empty text."""
        if problem:
            self.problems[problem.partition(" (")[0]] += 1
            if len(self.examples) < MAX_EXAMPLES:
                self.examples.append(problem)

    def latencies_by_minute(self) -> list[dict[str, float] | None]:
        """Percentiles of each full minute up to the last answer, in ms; None for one without answers."""
        times, latencies = np.array(self.answers).reshape(-1, 2).T
        minutes = (times // MINUTE_S).astype(int)
        return [
            percentiles(latencies[minutes == minute]) if (minutes == minute).any() else None
            for minute in range(minutes.max(initial=0))
        ]

    def memory_slopes_mb_per_h(self, last_s: float) -> dict[str, float]:
        """Growth of each kind of memory over the last seconds, by least squares; empty below two samples."""
        late = [(at, sizes) for at, sizes in self.memory_mb if at >= self.memory_mb[-1][0] - last_s]
        if len(late) < 2:
            return {}
        hours = [at / 3600 for at, _ in late]
        return {
            kind: float(np.polyfit(hours, [sizes[kind] for _, sizes in late], 1)[0]) for kind in late[0][1]
        }

    def late_slopes_mb_per_h(self) -> dict[str, float]:
        """Growth of each kind of memory over the second half of the time."""
        return self.memory_slopes_mb_per_h(self.memory_mb[-1][0] / 2) if self.memory_mb else {}

    def p99_growth(self) -> float | None:
        """p99 of the last full minute over that of the second; None without answers in both.

        The first minute is left out: it has the first use of everything.
        """
        minutes = self.latencies_by_minute()
        if len(minutes) < 3:
            return None
        second, last = minutes[1], minutes[-1]
        return last["p99"] / second["p99"] if second and last else None

    def to_json(self) -> dict[str, Any]:
        """The record and its figures."""
        return {
            "interrupted": self.interrupted,
            "answers": len(self.answers),
            "problems": dict(self.problems),
            "by_minute_ms": self.latencies_by_minute(),
            "p99_growth": self.p99_growth(),
            "slopes_of_the_second_half_mb_per_h": self.late_slopes_mb_per_h(),
            "memory_mb": self.memory_mb,
            "examples": self.examples,
        }


def soak(
    served: ServedModel,
    mixture: Sequence[MixedRequest],
    clients: int,
    duration_s: float,
    rate_per_s: float | None = None,
) -> SoakRecord:
    """Send the requests again and again from several clients, each one after another.

    rate_per_s: requests of all clients together, above 0; a client that is behind does not catch up. None: as
    many as the server answers.

    Ctrl-C (KeyboardInterrupt in this thread) ends the soak early, with the record of the time until then.

    Raises:
        ScriptError: the first request gets no answer. Later failures are in the record.
    """
    _require_answer(served, mixture[0])
    record, lock, stop = SoakRecord(), threading.Lock(), threading.Event()
    start = time.monotonic()

    def send_all(client: int) -> None:
        random = np.random.default_rng(client)
        interval_s = 0.0 if rate_per_s is None else clients / rate_per_s
        due = start + interval_s * client / clients
        with direct_session() as session:
            while not stop.wait(due - time.monotonic()) and time.monotonic() < start + duration_s:
                due = max(due + interval_s, time.monotonic())
                request = mixture[int(random.integers(0, len(mixture)))]
                sent = time.monotonic()
                try:
                    response = _post(session, served.predictions_url, request)
                except requests.RequestException as error:
                    with lock:
                        record.problems[f"no answer: {type(error).__name__}"] += 1
                    stop.wait(PAUSE_S)
                    continue
                answered = time.monotonic()
                problem = _problem_with(response, request)
                with lock:
                    record.answers.append((answered - start, (answered - sent) * 1e3))
                    record.add_problem(problem)

    def sample_memory() -> None:
        try:
            sizes = memory_mb(served)
        except MEMORY_FAILURES as error:
            with lock:
                record.problems[f"no memory sample: {type(error).__name__}"] += 1
        else:
            record.memory_mb.append((time.monotonic() - start, sizes))

    running: list[Future[None]] = []
    with DaemonThreads(clients) as threads:
        try:
            running += [threads.submit(functools.partial(send_all, client)) for client in range(clients)]
            while wait(running, timeout=0).not_done:
                sample_memory()
                wait(running, timeout=MEMORY_INTERVAL_S)
        except KeyboardInterrupt:
            record.interrupted = True
        finally:
            stop.set()
        # What hangs in a request may stay there for as long as TIMEOUT_S.
        for each in wait(running, ABANDONED_AFTER_S if record.interrupted else None).done:
            each.result()
    with lock:  # a copy: what was abandoned may go on recording
        return replace(record, answers=list(record.answers), problems=Counter(record.problems))


def _require_answer(served: ServedModel, request: MixedRequest) -> None:
    try:
        with direct_session() as session:
            _post(session, served.predictions_url, request)
    except requests.RequestException as error:
        raise ScriptError(
            f"no answer from {served.predictions_url} ({type(error).__name__}); start a server with "
            "`python scripts/serve.py`, or name another with --url"
        ) from error


def _post(session: requests.Session, url: str, request: MixedRequest) -> requests.Response:
    return session.post(url, data=request.body, headers=dict(request.headers), timeout=TIMEOUT_S)


def _problem_with(response: requests.Response, request: MixedRequest) -> str:
    """What is wrong with an answer; empty if nothing is."""
    content_type = response.headers.get("Content-Type", "")
    try:
        return request.problem_with(response.status_code, content_type, response.content)
    except (OSError, ValueError, LookupError, TypeError) as error:  # neither image nor detections
        return f"an answer that cannot be read: {type(error).__name__}"


def memory_mb(served: ServedModel) -> dict[str, float]:
    """Resident memory of the workers and of Java, and used memory of all GPUs where there are any.

    Raises:
        one of MEMORY_FAILURES: a process ended meanwhile, there is no worker, or the server does not tell.
    """
    description = describe_model(served.management_url, served.model_name)
    workers = [psutil.Process(int(worker["pid"])) for worker in description["workers"]]
    if not workers:
        raise LookupError(f"{served.model_name} has no worker")
    java = {worker.ppid() for worker in workers}
    sizes = {
        "worker": sum(worker.memory_info().rss for worker in workers) / BYTES_PER_MB,
        "java": sum(psutil.Process(pid).memory_info().rss for pid in java) / BYTES_PER_MB,
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        report = subprocess.run(query, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
        sizes["gpu"] = sum(map(float, report.split())) * 2**20 / BYTES_PER_MB
    return sizes
