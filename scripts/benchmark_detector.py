"""How fast the network and the detector are in this process, technique by technique.

    python scripts/benchmark_detector.py                            the ladder of the network
    python scripts/benchmark_detector.py --detector --precisions fp16 fp32    the whole detector as packed

The ladder starts from pixels on the device and ends with raw predictions there; every rung adds one technique
to those below it, all rungs of a batch size take turns in one run, and each stands beside float32: largest
difference of a score and of a box, AP where a data set is given (--voc). The detector table starts from JPEG
files and ends with detections on the host.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.accuracy.coco_metrics import compute_metrics
from lib.accuracy.datasets import DetectionDataset, read_voc
from lib.accuracy.predictors import EVALUATION_OPTIONS, detector_predictor, gather_predictions
from lib.archive.reader import load_detector
from lib.cli import positive_int
from lib.images import cycled, read_images
from lib.measure.ablation import BASELINE, AblationStep, Network, ablation_steps, flop_per_image, ready_calls
from lib.measure.calls import batch_calls
from lib.measure.environment import environment
from lib.measure.timing import Call, append_json_rows, format_table, interleaved_medians_s
from lib.packaging.class_names import DEMO_CLASS_NAMES, read_class_names
from lib.paths import DEMO_ARCHIVE, DEMO_WEIGHTS, SAMPLE_IMAGES

from damoyolo.backends.precision import PRECISIONS_OF_DEVICE
from damoyolo.boxes import decode_predictions
from damoyolo.detector import Detector
from damoyolo.pipeline import EagerPipeline
from damoyolo.structures import RawPredictions

PEAK_TFLOPS = 790.0  # dense 16-bit matrix products, measured on an H200; --peak-tflops for another chip
Row = dict[str, Any]


def measure_ablation(ablation: Sequence[AblationStep], pixels: Tensor) -> list[Row]:
    """One row a rung for the batch `pixels`, in the order of the ladder.

    pixels: (B, 3, H, W) uint8 on the device. A rung that runs out of memory has no figures.
    """
    device, batch_size = pixels.device, len(pixels)
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    reference: tuple[Tensor, Tensor] | None = None
    for step, call in _survivors(ablation, pixels, rows):
        rows[step.name]["peak_mib"] = _peak_mib(call, device)
        scores, boxes_xyxy = decode_predictions(RawPredictions(*map(tuple, call())))
        scores, boxes_xyxy = scores.cpu(), boxes_xyxy.cpu()
        reference = reference or (scores, boxes_xyxy)
        likely = reference[0].amax(dim=-1) > EVALUATION_OPTIONS.score_threshold
        rows[step.name]["score_difference"] = float((scores - reference[0]).abs().max())
        rows[step.name]["box_difference_px"] = float(
            (boxes_xyxy - reference[1])[likely].abs().max() if likely.any() else 0.0
        )
        calls[step.name] = call
    for name, seconds in interleaved_medians_s(calls, device).items():
        rows[name] |= {"ms": seconds * 1e3, "images_per_s": batch_size / seconds}
    baseline = rows.get(BASELINE, {}).get("ms")
    for row in rows.values():
        if baseline and "ms" in row:
            row["times_baseline"] = baseline / row["ms"]
    return list(rows.values())


def _survivors(
    ablation: Sequence[AblationStep], pixels: Tensor, rows: dict[str, Row]
) -> Iterator[tuple[AblationStep, Callable[[], RawPredictions]]]:
    """The rungs that run, with their calls; `rows` gets one for every rung."""
    for step in ablation:
        rows[step.name] = {"rung": step.name, "batch_size": len(pixels)}
        try:
            yield from ready_calls([step], pixels)
        except torch.OutOfMemoryError:
            rows[step.name]["failure"] = "out of memory"
            torch.cuda.empty_cache()


def _peak_mib(call: Call, device: torch.device) -> float | None:
    """Most memory in MiB that live tensors of this process took on the device during one call.

    Weights of other networks that are alive count too; what a replayed CUDA graph keeps in its pool does not.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def accuracy_of(network: Network, detector: Detector, dataset: DetectionDataset) -> float:
    """AP of a network inside an otherwise plain detector."""

    class NetworkBackend:
        """The network in place of the detector's own."""

        name, precision = "pytorch", "fp16"

        def __init__(self) -> None:
            self.device = detector.device

        def __call__(self, pixels: Tensor) -> RawPredictions:
            with torch.inference_mode():
                return RawPredictions(*map(tuple, network(pixels)))

    before = detector.pipeline
    detector.pipeline = EagerPipeline(
        NetworkBackend(), detector.input_size_hw, detector.config.max_candidates
    )
    try:
        predictor = detector_predictor(detector, EVALUATION_OPTIONS, batch_size=8)
        predictions, _ = gather_predictions(dataset, predictor, progress=False)
    finally:
        detector.pipeline = before
    return float(compute_metrics(dataset, predictions).overall.ap)


def measure_detector(
    archive: Path,
    precisions: Sequence[str],
    batch_sizes: Sequence[int],
    images: Sequence[bytes],
    device: torch.device,
) -> list[Row]:
    """Seconds of a batch of the whole detector, one row a precision and batch size."""
    detectors = {precision: load_detector(archive, device, precision=precision) for precision in precisions}
    rows = []
    for batch_size in batch_sizes:
        calls = {
            f"{part} {precision}": call
            for precision, detector in detectors.items()
            for part, call in batch_calls(detector, images, batch_size).items()
        }
        medians_s = interleaved_medians_s(calls, device)
        for precision in precisions:
            network_s, detector_s = medians_s[f"network {precision}"], medians_s[f"detector {precision}"]
            rows.append(
                {
                    "backend": detectors[precision].pipeline.name,
                    "precision": precision,
                    "batch_size": batch_size,
                    "network_ms": network_s * 1e3,
                    "detector_ms": detector_s * 1e3,
                    "network_images_per_s": batch_size / network_s,
                    "detector_images_per_s": batch_size / detector_s,
                }
            )
    return rows


LADDER_COLUMNS = {
    "rung": ("rung", ""),
    "batch_size": ("batch", "d"),
    "ms": ("ms", ".3f"),
    "images_per_s": ("images/s", ".0f"),
    "times_baseline": ("x baseline", ".2f"),
    "peak_mib": ("peak MiB", ".0f"),
    "score_difference": ("score diff", ".1e"),
    "box_difference_px": ("box diff px", ".2f"),
    "ap": ("AP", ".4f"),
    "peak_share": ("of peak", ".1%"),
}
DETECTOR_COLUMNS = {
    "backend": ("backend", ""),
    "precision": ("precision", ""),
    "batch_size": ("batch", "d"),
    "network_ms": ("network ms", ".2f"),
    "network_images_per_s": ("images/s", ".1f"),
    "detector_ms": ("detector ms", ".2f"),
    "detector_images_per_s": ("images/s", ".1f"),
}


def _climb(arguments: argparse.Namespace, images: Sequence[bytes], device: torch.device) -> list[Row]:
    names = read_class_names(arguments.class_names) if arguments.class_names else DEMO_CLASS_NAMES
    ablation = ablation_steps(Path(arguments.weights), len(names), device, compile_too=arguments.compile)
    detector = load_detector(arguments.archive, device, precision="fp32")
    accuracies: dict[str, float] = {}
    if arguments.voc:
        dataset = read_voc(arguments.voc, "test")
        accuracies = {step.name: accuracy_of(step.build(), detector, dataset) for step in ablation}
    rows = []
    for batch_size in arguments.batch_sizes:
        rows += measure_ablation(ablation, detector.preprocessor.prepare(cycled(images, batch_size)).pixels)
    flop = flop_per_image(Path(arguments.weights), len(names))
    for row in rows:
        row["ap"] = accuracies.get(row["rung"])
        if "images_per_s" in row and device.type == "cuda":
            row["peak_share"] = row["images_per_s"] * flop / arguments.peak_tflops / 1e12
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--detector", action="store_true", help="the whole detector instead of the ladder")
    parser.add_argument("--archive", type=Path, default=DEMO_ARCHIVE)
    parser.add_argument("--weights", default=str(DEMO_WEIGHTS), help="of the ladder, as trained")
    parser.add_argument("--class-names", type=Path, help="of --weights (default: the demo's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precisions", nargs="+", help="of --detector (default: all of the device)")
    parser.add_argument("--batch-sizes", nargs="+", type=positive_int, default=[1, 8, 32])
    parser.add_argument("--images", type=Path, default=SAMPLE_IMAGES, help="folder of JPEGs")
    parser.add_argument("--voc", type=Path, help="data set in Pascal-VOC form for the AP of each rung")
    parser.add_argument("--compile", action="store_true", help="add torch.compile to the ladder")
    parser.add_argument("--peak-tflops", type=float, default=PEAK_TFLOPS, help="of the chip, 16-bit products")
    parser.add_argument("--json", type=Path, help="file that gets one JSON row a measurement")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    try:
        images = read_images(arguments.images)
    except FileNotFoundError as error:
        print(f"benchmark_detector: {error}", file=sys.stderr)
        return 1
    if arguments.detector:
        precisions = arguments.precisions or PRECISIONS_OF_DEVICE[device.type]
        rows = measure_detector(arguments.archive, precisions, arguments.batch_sizes, images, device)
    else:
        rows = _climb(arguments, images, device)
    facts = environment()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(format_table(rows, DETECTOR_COLUMNS if arguments.detector else LADDER_COLUMNS))
    if arguments.json:
        append_json_rows(arguments.json, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
