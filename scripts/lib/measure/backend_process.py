"""Measure archives in turn, each in a fresh process."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.archive.reader import archive_environment
from lib.cli import ScriptError

SCRIPTS_DIR = Path(__file__).resolve().parents[2]
ANSWER_TIMEOUT_S = 900.0
Row = dict[str, Any]


class WorkerError(ScriptError):
    """The process cannot load the archive, or cannot answer.

    A class of its own because the other processes go on: its row is listed as not run.

    kind: what the process died of, or the name of the error in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.kind = message.partition(":")[0]


@dataclass(frozen=True)
class Method:
    """How to measure.

    batch_sizes: ascending, starting with 1. rounds: turns of each archive. slice_s: seconds of a turn.
    images: folder of JPEG files. voc: data set for the AP, or None.
    threads: of PyTorch and the backends; None for PyTorch's default.
    """

    batch_sizes: tuple[int, ...]
    rounds: int
    slice_s: float
    images: Path
    voc: Path | None = None
    threads: int | None = None


class WorkerProcess:
    """A process of `backend_worker` that has loaded an archive; `started` is the answer to "start".

    folder: the unpacked archive, whose modules the process runs.

    Raises:
        WorkerError: it cannot load the archive.
    """

    def __init__(self, folder: Path, device: str, method: Method) -> None:
        command = [sys.executable, "-m", "lib.measure.backend_worker", "--folder", str(folder)]
        command += ["--device", device, "--images", str(method.images.resolve())]
        if method.threads is not None:
            command += ["--threads", str(method.threads)]
        environment = archive_environment(folder, PYTHONDONTWRITEBYTECODE="1")
        # Behind the archive; importing `lib` appends the checkout's handler, also behind it.
        environment["PYTHONPATH"] += f"{os.pathsep}{SCRIPTS_DIR}"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `close`)
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.started = self.ask("start")
        except WorkerError:
            self.close()
            raise

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, question: str, **arguments: Any) -> Row:
        """The answer to a question (a method of `MeasuredDetector`).

        Raises:
            WorkerError: the process failed or has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; the exit status follows below
            print(json.dumps({"ask": question, **arguments}), file=self._process.stdin, flush=True)
        timer = threading.Timer(ANSWER_TIMEOUT_S, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            last_lines = "".join(self._errors.readlines()[-15:])
            raise WorkerError(f"process ended: status {status}, no answer.\n{last_lines}")
        answer: Row = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def measure_in_turn(
    folders: Mapping[str, Path], device: str, method: Method, reference: Path, say: Callable[[str], object]
) -> dict[str, Row]:
    """The figures of each archive, or "not_run" with the reason.

    All processes are started one after the other and stay alive, idle until asked. Then each figure of each
    archive gets a slice of time, in turn, for all rounds; the result is the median over the rounds.

    folders: unpacked archives by row name. reference: file of `write_reference`. say: reports progress.
    """
    rows: dict[str, Row] = {}
    workers: dict[str, WorkerProcess] = {}
    with ExitStack() as stack:

        def failed(name: str, error: WorkerError) -> None:
            say(f"{name}: {error}")
            rows[name] = {"not_run": f"failed: {error.kind}"}
            workers.pop(name, None)

        for name, folder in folders.items():
            try:
                before_mib = _used_device_mib(device)
                workers[name] = stack.enter_context(WorkerProcess(folder, device, method))
                rows[name] = _facts(workers[name], device, before_mib, method, reference)
                say(f"{name}: started in {rows[name]['start_s']:.1f} s, AP {rows[name].get('ap')}")
            except WorkerError as error:
                failed(name, error)
        figures = [("network", 1), *(("detector", size) for size in method.batch_sizes)]
        seconds: dict[str, dict[tuple[str, int], list[float]]] = {name: {} for name in workers}
        for round_index, (part, batch_size) in itertools.product(range(method.rounds), figures):
            if (part, batch_size) == figures[0]:
                say(f"round {round_index + 1} of {method.rounds}")
            for name in list(workers):
                try:
                    answer = workers[name].ask(
                        "time", part=part, batch_size=batch_size, slice_s=method.slice_s
                    )
                except WorkerError as error:
                    failed(name, error)
                else:
                    seconds[name].setdefault((part, batch_size), []).append(answer["seconds"])
        for name in workers:
            medians_s = {figure: statistics.median(each) for figure, each in seconds[name].items()}
            rows[name] |= _speeds(medians_s, method.batch_sizes)
    return rows


def _facts(
    worker: WorkerProcess, device: str, before_mib: float | None, method: Method, reference: Path
) -> Row:
    """Start-up time, memory, agreement and AP; memory first, because the rest takes more than serving does.

    before_mib: memory used on the GPU before the process started.
    """
    facts = {
        **worker.started,
        **worker.ask("warm", batch_sizes=method.batch_sizes),
        **worker.ask("agreement", reference=str(reference.resolve())),
    }
    if before_mib is not None:
        facts["device_mib"] = (_used_device_mib(device) or 0.0) - before_mib
    if method.voc is not None:
        facts |= worker.ask("ap", voc=str(method.voc.resolve()))
    return facts


def _speeds(medians_s: Mapping[tuple[str, int], float], batch_sizes: Sequence[int]) -> Row:
    rates = {size: size / medians_s["detector", size] for size in batch_sizes}
    best = max(rates, key=lambda size: rates[size])
    return {
        "network_ms": medians_s["network", 1] * 1e3,
        "detector_ms": medians_s["detector", 1] * 1e3,
        "images_per_s": rates[1],
        "best_images_per_s": rates[best],
        "best_batch_size": best,
        "images_per_s_by_batch_size": {str(size): rate for size, rate in rates.items()},
    }


def _used_device_mib(device: str) -> float | None:
    """Memory in MiB that all processes together use on a GPU; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return (total - free) / 2**20


def write_reference(path: Path, folder: Path, device: str, images: Sequence[bytes]) -> None:
    """Write what PyTorch in float32 predicts for encoded images with the weights of an unpacked archive."""
    from damoyolo.boxes import decode_predictions
    from damoyolo.detector import Detector

    detector = Detector.from_archive_dir(folder, device, precision="fp32", backend="pytorch")
    try:
        pixels = detector.preprocessor.prepare(images).pixels
        scores, boxes_xyxy = decode_predictions(detector.raw_predictions(pixels))
        torch.save(
            {"pixels": pixels.cpu().contiguous(), "scores": scores.cpu(), "boxes_xyxy": boxes_xyxy.cpu()},
            path,
        )
    finally:
        detector.close()
