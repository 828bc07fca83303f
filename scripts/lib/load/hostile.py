"""Post arbitrary files to a running server beside good images, and watch what they cost whom."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import requests

from lib.accuracy.agreement import differences
from lib.cli import ScriptError
from lib.server.local_http import direct_session
from lib.server.process import describe_model
from lib.server.served_archive import ServedModel

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 150.0  # longer than the server's own limit for a batch, so that its answer is seen
BYTES_PER_MB = 1e6


def _as_json(content: bytes) -> dict[str, Any]:
    return {"json": {"image": base64.b64encode(content).decode()}}


# How a file is sent: keyword arguments of requests.post.
FORMS: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "raw": lambda content: {"data": content, "headers": {"Content-Type": "application/octet-stream"}},
    "form": lambda content: {
        "data": content,
        "headers": {"Content-Type": "application/x-www-form-urlencoded"},
    },
    "multipart": lambda content: {"files": {"data": content}},
    "json": _as_json,
    "body-as-json": lambda content: {"data": content, "headers": {"Content-Type": "application/json"}},
    "drawn": lambda content: {"data": content, "headers": {"Accept": "image/jpeg"}},
}


@dataclass(frozen=True)
class Limits:
    """What a single request may cost.

    seconds: until its answer. memory_mb: growth of the worker's resident memory, 10^6 bytes.
    """

    seconds: float
    memory_mb: float


@dataclass(frozen=True)
class Attempt:
    """One file sent in one form.

    status: HTTP status; 0 if there was no answer. seconds: until the answer. peak_mb: the most by which the
    workers' resident memory exceeded what it was before, 10^6 bytes. problems: what was wrong; empty if
    nothing was.
    """

    file: str
    form: str
    status: int
    seconds: float
    peak_mb: float
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


class HostileClient:
    """Sends one file at a time, each together with good images, which must be answered as ever.

    served: the model; its workers run on this machine.
    good: encoded images that accompany each file. limits: what a file may cost.

    Raises:
        ScriptError: the server does not answer the good images.
    """

    def __init__(self, served: ServedModel, good: Sequence[bytes], limits: Limits) -> None:
        self._served = served
        self._limits = limits
        self._good = list(good)
        self._pool = ThreadPoolExecutor(len(good) + 1)
        self._expected = [self._answer_to(image) for image in good]
        self._pids = self._worker_pids()

    def try_files(self, files: Sequence[Path], forms: Sequence[str]) -> Iterator[Attempt]:
        """Send every file in every form; yields each result as it comes."""
        for file in files:
            content = file.read_bytes()
            for form in forms:
                yield self._try(str(file), form, FORMS[form](content))

    def _try(self, file: str, form: str, arguments: dict[str, Any]) -> Attempt:
        before = sum(_resident_bytes(pid, reset_peak=True) for pid in self._pids)
        neighbours = [self._pool.submit(self._answer_to, image) for image in self._good]
        start = time.perf_counter()
        status, problems = self._send(arguments)
        seconds = time.perf_counter() - start
        for index, neighbour in enumerate(neighbours):
            try:
                if differences(neighbour.result()["detections"], self._expected[index]["detections"]):
                    problems.append("a neighbour got another answer than alone")
            except ScriptError as error:
                problems.append(f"a neighbour failed: {error}")
        peak_mb = max(0, sum(map(_resident_bytes, self._pids)) - before) / BYTES_PER_MB
        pids = self._worker_pids()
        if pids != self._pids:
            problems.append("a worker ended")
            self._pids = pids
        if seconds > self._limits.seconds:
            problems.append(f"{seconds:.1f} s; the limit is {self._limits.seconds:g} s")
        if peak_mb > self._limits.memory_mb:
            problems.append(f"{peak_mb:.0f} MB; the limit is {self._limits.memory_mb:g} MB")
        return Attempt(file, form, status, round(seconds, 3), round(peak_mb, 1), tuple(problems))

    def _send(self, arguments: dict[str, Any]) -> tuple[int, list[str]]:
        try:
            with direct_session() as session:
                response = session.post(
                    self._served.predictions_url, timeout=(CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S), **arguments
                )
        except requests.RequestException as error:
            return 0, [f"no answer: {type(error).__name__}"]
        return response.status_code, [f"status {response.status_code}"] if response.status_code >= 500 else []

    def _answer_to(self, image: bytes) -> dict[str, Any]:
        try:
            with direct_session() as session:
                response = session.post(
                    self._served.predictions_url,
                    timeout=(CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S),
                    **FORMS["raw"](image),
                )
                response.raise_for_status()
                answer: dict[str, Any] = response.json()
                return answer
        except requests.RequestException as error:
            raise ScriptError(f"{type(error).__name__} for a good image: {error}") from error

    def _worker_pids(self) -> list[int]:
        description = describe_model(self._served.management_url, self._served.model_name)
        return sorted(int(worker["pid"]) for worker in description["workers"])

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _resident_bytes(pid: int, reset_peak: bool = False) -> int:
    """The most memory that a process had resident since its peak was reset; 0 if it has ended.

    Linux: VmHWM of /proc/PID/status; writing 5 to /proc/PID/clear_refs sets it to the present value; proc(5).
    """
    with contextlib.suppress(OSError):
        if reset_peak:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def summarize(attempts: Sequence[Attempt]) -> str:
    """A table with a line for each kind of file (the folder that it lies in) and form."""
    rows: dict[tuple[str, str], list[Attempt]] = {}
    for attempt in attempts:
        rows.setdefault((Path(attempt.file).parent.name, attempt.form), []).append(attempt)
    lines = [f"{'folder':24} {'form':13} {'tried':>6} {'worst s':>8} {'worst MB':>9}  statuses"]
    for (folder, form), group in sorted(rows.items()):
        statuses = sorted({attempt.status for attempt in group})
        counts = {status: sum(attempt.status == status for attempt in group) for status in statuses}
        lines.append(
            f"{folder[:24]:24} {form:13} {len(group):6} {max(a.seconds for a in group):8.2f} "
            f"{max(a.peak_mb for a in group):9.0f}  "
            + ", ".join(f"{status}: {count}" for status, count in counts.items())
        )
    return "\n".join(lines)
