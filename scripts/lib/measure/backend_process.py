"""Archives measured in turn, each in a fresh process of its own."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lib.archive.reader import archive_environment

WORKER = Path(__file__).with_name("backend_worker.py")
ANSWER_TIMEOUT_S = 900.0
Row = dict[str, Any]


class WorkerError(Exception):
    """The process cannot load the archive, or cannot answer.

    kind: the name of the error there, in one word.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.kind = message.partition(":")[0]


@dataclass(frozen=True)
class Method:
    """How to measure.

    batch_sizes: ascending, the first is 1. slice_s: seconds of a turn. images: folder of JPEG files.
    voc: data set for the AP, or None. threads: of PyTorch and the backends; None leaves it to PyTorch.
    """

    batch_sizes: tuple[int, ...]
    rounds: int
    slice_s: float
    images: Path
    voc: Path | None = None
    threads: int | None = None

    def to_mapping(self) -> Row:
        """What figures depend on, for the record; folders by their names."""
        return {
            "batch_sizes": list(self.batch_sizes),
            "rounds": self.rounds,
            "slice_s": self.slice_s,
            "images": self.images.resolve().name,
            "data_set": None if self.voc is None else self.voc.resolve().name,
        }


class WorkerProcess:
    """A process of `backend_worker` that has loaded an archive; `started` is its first answer.

    folder: the unpacked archive, whose modules the process runs.

    Raises:
        WorkerError: it cannot load the archive.
    """

    def __init__(self, folder: Path, device: str, method: Method) -> None:
        command = [sys.executable, str(WORKER), "--folder", str(folder), "--device", device]
        command += ["--images", str(method.images.resolve())]
        if method.threads is not None:
            command += ["--threads", str(method.threads)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `close`)
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=archive_environment(folder, PYTHONDONTWRITEBYTECODE="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.started = self._answer()
        except WorkerError:
            self.close()
            raise

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, question: str, **arguments: Any) -> Row:
        """The answer to a question (a method of `MeasuredDetector`).

        Raises:
            WorkerError: there is none.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading says why
            print(json.dumps({"ask": question, **arguments}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        timer = threading.Timer(ANSWER_TIMEOUT_S, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            status = self._process.wait()
            raise WorkerError(f"process ended: status {status}, no answer.\n{self._last_errors()}")
        answer: Row = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_errors(self) -> str:
        self._errors.seek(0)
        return "".join(self._errors.readlines()[-15:])

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def measure_in_turn(
    folders: Mapping[str, Path], device: str, method: Method, reference: Path, say: Any = print
) -> dict[str, Row]:
    """The figures of each archive, or its "not_run" with the reason.

    They start one after the other and stay; then each gets a slice of time for each figure, in turn and so
    many rounds, and the figure is the median. Whoever is not asked waits asleep.

    folders: unpacked archives by the names of their rows. reference: file of `write_reference`.
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
                rows[name] = _facts(workers[name], method, reference)
                if before_mib is not None:
                    rows[name]["device_mib"] = (_used_device_mib(device) or 0.0) - before_mib
                if method.voc is not None:
                    rows[name] |= workers[name].ask("ap", voc=str(method.voc.resolve()))
                say(f"{name}: started in {rows[name]['start_s']:.1f} s, AP {rows[name].get('ap')}")
            except WorkerError as error:
                failed(name, error)
        figures = [("network", 1), *(("detector", size) for size in method.batch_sizes)]
        seconds: dict[str, dict[tuple[str, int], list[float]]] = {name: {} for name in workers}
        for round_index in range(method.rounds):
            say(f"round {round_index + 1} of {method.rounds}")
            for part, batch_size in figures:
                for name in list(workers):
                    question = {"part": part, "batch_size": batch_size, "slice_s": method.slice_s}
                    try:
                        answer = workers[name].ask("time", **question)
                    except WorkerError as error:
                        failed(name, error)
                        continue
                    seconds[name].setdefault((part, batch_size), []).append(answer["seconds"])
        for name in workers:
            medians_s = {figure: statistics.median(each) for figure, each in seconds[name].items()}
            rows[name] |= _speeds(medians_s, method.batch_sizes)
    return rows


def _facts(worker: WorkerProcess, method: Method, reference: Path) -> Row:
    """Start, memory and agreement; memory ahead of what the server's worker would not do."""
    return {
        **worker.started,
        **worker.ask("warm", batch_sizes=method.batch_sizes),
        **worker.ask("agreement", reference=str(reference.resolve())),
    }


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
    """Memory in MiB that all processes together take on a GPU; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return (total - free) / 2**20


def write_reference(path: Path, folder: Path, device: str, images: Sequence[bytes]) -> None:
    """What PyTorch in float32 predicts for images with the weights of an unpacked archive.

    images: encoded.
    """
    from damoyolo.boxes import decode_predictions
    from damoyolo.detector import Detector

    detector = Detector.from_archive_dir(folder, device, precision="fp32", backend="pytorch")
    try:
        pixels = detector.preprocessor.prepare(images).pixels
        scores, boxes_xyxy = decode_predictions(detector.raw_predictions(pixels))
        torch.save(
            {
                "pixels": pixels.cpu().contiguous(),
                "scores": scores.cpu(),
                "boxes_xyxy": boxes_xyxy.cpu(),
            },
            path,
        )
    finally:
        detector.close()
