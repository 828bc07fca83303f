"""Measure one archive in a process of its own, as a worker of the server runs it; see `backend_process`.

Each line on stdin is a question, {"ask": NAME, ...}; the following line on stdout is its answer, or
{"error": TEXT}. The questions are the methods of `MeasuredDetector`, "start" first.

Started with `python -m lib.measure.backend_worker` and the archive at the front of the search path. Its
`damoyolo` is the one to measure: `lib` puts the checkout's at the end of the path, and nothing here may
import anything else of `lib` before the archive's `damoyolo` is imported.
"""

from __future__ import annotations

import argparse
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
    """The detector of an unpacked archive.

    Each question imports what it needs, so that start-up time and memory are those of the detector alone.
    """

    def __init__(self, folder: Path, device: str, threads: int | None, images: Path) -> None:
        self._folder, self._device, self._threads = folder, device, threads
        self._images = [path.read_bytes() for path in sorted(images.glob("*.jpg"))]
        self._calls: dict[tuple[str, int], Callable[[], object]] = {}

    def start(self) -> Answer:
        """Load; seconds of the imports that all backends share, and from then until the first detection."""
        started = time.perf_counter()
        import torch

        from damoyolo.detector import Detector

        if self._threads is not None:
            torch.set_num_threads(self._threads)
        imported = time.perf_counter()
        self.detector = Detector.from_archive_dir(self._folder, self._device)
        self.detector.detect(self._images[:1], [self.detector.config.default_options()])
        return {
            "import_s": imported - started,
            "start_s": time.perf_counter() - imported,
            "resident_mib": _memory_mib("VmRSS"),
            "runs_in": f"{self.detector.pipeline.name} {self.detector.pipeline.precision}",
        }

    def warm(self, batch_sizes: Sequence[int]) -> Answer:
        """Run each batch size once; the peak memory so far."""
        for batch_size in batch_sizes:
            self._call("detector", batch_size)()
        return {"peak_mib": _memory_mib("VmHWM")}

    def agreement(self, reference: str) -> Answer:
        """How far the raw predictions differ from those in a file: pixels, scores, boxes_xyxy."""
        import dataclasses

        import torch

        from lib.accuracy.parity import compare_decoded

        from damoyolo.boxes import decode_predictions

        expected = torch.load(reference, weights_only=True)
        with torch.inference_mode():
            predictions = self.detector.raw_predictions(expected["pixels"].to(self.detector.device))
            scores, boxes_xyxy = (each.cpu() for each in decode_predictions(predictions))
        found = compare_decoded((scores, boxes_xyxy), (expected["scores"], expected["boxes_xyxy"]))
        return dataclasses.asdict(found)

    def ap(self, voc: str) -> Answer:
        """AP on the test split of a data set in Pascal VOC format."""
        from lib.accuracy.datasets import read_voc
        from lib.accuracy.parity import average_precision

        return {"ap": average_precision(self.detector, read_voc(Path(voc), "test"))}

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
    """Memory of this process on the host in MiB, from an entry of /proc/self/status; None without Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{entry}:")), None)


def main() -> None:
    """Answer until the questions end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="unpacked archive")
    parser.add_argument("--device", required=True, help="cpu or cuda[:index]")
    parser.add_argument("--threads", type=int, help="of PyTorch and the backend")
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG files")
    detector = MeasuredDetector(**vars(parser.parse_args()))
    # Libraries may print to stdout: send that to stderr and keep the answers apart.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        question = json.loads(line)
        try:
            text = json.dumps(getattr(detector, question.pop("ask"))(**question), allow_nan=False)
        except Exception as error:  # reported to the process that asked
            traceback.print_exc()
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
        print(text, file=answers)


if __name__ == "__main__":
    main()
