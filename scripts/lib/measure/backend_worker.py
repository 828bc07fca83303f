"""One archive in a process of its own, as a worker of the server has it; asked and answered in JSON.

    python scripts/lib/measure/backend_worker.py --folder UNPACKED --device cpu --images tests/data/smears

A line on stdin is a question, {"ask": NAME, ...}; the line on stdout that follows is its answer, or
{"error": TEXT}. The questions are the methods of `MeasuredDetector`. `backend_process` asks them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


class MeasuredDetector:
    """The detector of an unpacked archive, from its start on.

    What the questions need beside the detector is imported by them, so that start and memory are those of
    the detector.
    """

    def __init__(self, folder: Path, device: str, threads: int | None, images: Path) -> None:
        started = time.perf_counter()
        import torch

        # Before any module of scripts/, which would put the project's own package in front of the archive's.
        from damoyolo.detector import Detector

        if threads is not None:
            torch.set_num_threads(threads)
        self._import_s = time.perf_counter() - started
        self._images = [path.read_bytes() for path in sorted(images.glob("*.jpg"))]
        self._calls: dict[tuple[str, int], Callable[[], object]] = {}
        started = time.perf_counter()
        self.detector = Detector.from_archive_dir(folder, device)
        self.detector.detect(self._images[:1], [self.detector.config.default_options()])
        self._start_s = time.perf_counter() - started

    def start(self) -> Answer:
        """Seconds of the imports that all backends share, and from then on until the first detection."""
        return {
            "import_s": self._import_s,
            "start_s": self._start_s,
            "resident_mib": _memory_mib("VmRSS"),
            "runs_in": f"{self.detector.pipeline.name} {self.detector.pipeline.precision}",
        }

    def warm(self, batch_sizes: Sequence[int]) -> Answer:
        """Run each batch size once; the most memory that took."""
        for batch_size in batch_sizes:
            self._call("detector", batch_size)()
        return {"peak_mib": _memory_mib("VmHWM")}

    def agreement(self, reference: str) -> Answer:
        """How far the raw predictions are from those in a file: pixels, scores, boxes_xyxy."""
        import torch

        from lib.accuracy.parity import compare_decoded

        from damoyolo.boxes import decode_predictions

        expected = torch.load(reference, weights_only=True)
        with torch.inference_mode():
            found = decode_predictions(
                self.detector.raw_predictions(expected["pixels"].to(self.detector.device))
            )
        scores, boxes_xyxy = (each.cpu() for each in found)
        agreement = compare_decoded((scores, boxes_xyxy), (expected["scores"], expected["boxes_xyxy"]))
        return {
            "score_difference": agreement.score_difference,
            "box_difference_px": agreement.box_difference_px,
        }

    def ap(self, voc: str) -> Answer:
        """AP on the test split of a data set in Pascal-VOC form."""
        from lib.accuracy.datasets import read_voc
        from lib.accuracy.parity import average_precision

        return {"ap": float(average_precision(self.detector, read_voc(Path(voc), "test")))}

    def time(self, part: str, batch_size: int, slice_s: float) -> Answer:
        """Mean seconds of a batch in one slice of time. part: "network" or "detector"."""
        from lib.measure.timing import mean_of_slice_s

        return {"seconds": mean_of_slice_s(self._call(part, batch_size), self.detector.device, slice_s)}

    def _call(self, part: str, batch_size: int) -> Callable[[], object]:
        from lib.measure.calls import batch_calls

        if (part, batch_size) not in self._calls:
            call = batch_calls(self.detector, self._images, batch_size)[part]
            call()  # once untimed
            self._calls[part, batch_size] = call
        return self._calls[part, batch_size]


def _memory_mib(entry: str) -> float | None:
    """Memory of this process on the host in MiB, as Linux counts it; None elsewhere."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{entry}:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Load the archive, then answer until the questions end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="unpacked archive")
    parser.add_argument("--device", required=True, help="cpu or cuda[:index]")
    parser.add_argument("--threads", type=int, help="of PyTorch and the backend (PyTorch's own choice)")
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG files")
    arguments = parser.parse_args(argv)
    # Libraries print to stdout too; from here on that goes to stderr, and answers alone are answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(make: Callable[[], Answer]) -> bool:
        try:
            text = json.dumps(make(), allow_nan=False)
        except Exception as error:  # goes to whoever asked
            traceback.print_exc()
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
            print(text, file=answers)
            return False
        print(text, file=answers)
        return True

    loaded: list[MeasuredDetector] = []

    def load() -> Answer:
        loaded.append(
            MeasuredDetector(arguments.folder, arguments.device, arguments.threads, arguments.images)
        )
        return loaded[0].start()

    if not answer(load):
        return 1
    for line in sys.stdin:
        question = json.loads(line)
        answer(functools.partial(getattr(loaded[0], question.pop("ask")), **question))
    return 0


if __name__ == "__main__":
    sys.exit(main())
