"""Load a server for a long time with mixed requests; record wrong answers, latencies and memory."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import requests

from lib.load.generator import percentiles
from lib.load.mixed_requests import MixedRequest
from lib.server.local_http import direct_session
from lib.server.process import describe_model
from lib.server.served_archive import ServedModel

MEMORY_INTERVAL_S = 5.0
TIMEOUT_S = 120.0
MINUTE_S = 60.0
BYTES_PER_MB = 1e6


@dataclass
class SoakRecord:
    """What was seen.

    answers: (seconds since the start, latency in ms) of each. problems: wrong answers by what was wrong.
    memory_mb: (seconds since the start, resident memory in 10^6 bytes by kind: worker, java, gpu).
    """

    answers: list[tuple[float, float]] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    memory_mb: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def latencies_by_minute(self) -> list[dict[str, float]]:
        """Percentiles of each full minute, in ms."""
        times, latencies = np.array(self.answers).reshape(-1, 2).T
        minutes = (times // MINUTE_S).astype(int)
        return [percentiles(latencies[minutes == minute]) for minute in range(minutes.max())]

    def memory_slopes_mb_per_h(self, last_s: float) -> dict[str, float]:
        """Growth of each kind of memory over the last seconds, by least squares."""
        end = self.memory_mb[-1][0]
        late = [(at, sizes) for at, sizes in self.memory_mb if at >= end - last_s]
        hours = [at / 3600 for at, _ in late]
        return {
            kind: float(np.polyfit(hours, [sizes[kind] for _, sizes in late], 1)[0]) for kind in late[0][1]
        }

    def to_json(self) -> dict[str, Any]:
        """The record and its figures."""
        return {
            "answers": len(self.answers),
            "problems": dict(self.problems),
            "by_minute_ms": self.latencies_by_minute(),
            "slopes_of_the_second_half_mb_per_h": self.memory_slopes_mb_per_h(self.memory_mb[-1][0] / 2),
            "memory_mb": self.memory_mb,
        }


def soak(served: ServedModel, mixture: Sequence[MixedRequest], clients: int, duration_s: float) -> SoakRecord:
    """Send the requests again and again from several clients, each one after another."""
    record, lock = SoakRecord(), threading.Lock()
    start = time.monotonic()

    def send_all(client: int) -> None:
        random = np.random.default_rng(client)
        with direct_session() as session:
            while time.monotonic() < start + duration_s:
                request = mixture[int(random.integers(0, len(mixture)))]
                sent = time.monotonic()
                problem = _send(session, served.predictions_url, request)
                with lock:
                    record.answers.append((time.monotonic() - start, (time.monotonic() - sent) * 1e3))
                    record.problems.update([problem] if problem else [])

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(send_all, client) for client in range(clients)]
        while not all(each.done() for each in running):
            record.memory_mb.append((time.monotonic() - start, memory_mb(served)))
            time.sleep(MEMORY_INTERVAL_S)
        for each in running:
            each.result()
    return record


def _send(session: requests.Session, url: str, request: MixedRequest) -> str:
    try:
        response = session.post(url, data=request.body, headers=dict(request.headers), timeout=TIMEOUT_S)
    except requests.RequestException as error:
        return f"no answer: {type(error).__name__}"
    return request.problem_with(
        response.status_code, response.headers.get("Content-Type", ""), response.content
    )


def memory_mb(served: ServedModel) -> dict[str, float]:
    """Resident memory of the workers and of Java, and used memory of all GPUs where there are any."""
    description = describe_model(served.management_url, served.model_name)
    workers = [psutil.Process(int(worker["pid"])) for worker in description["workers"]]
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
