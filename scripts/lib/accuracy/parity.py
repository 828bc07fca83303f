"""How far a backend's predictions are from those of PyTorch in float32: raw predictions of images, and AP."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib.accuracy.coco_metrics import MetricsError, compute_metrics
from lib.accuracy.datasets import DatasetError, DetectionDataset, read_coco, read_voc
from lib.accuracy.predictors import (
    EVALUATION_OPTIONS,
    EvaluationError,
    detector_predictor,
    gather_predictions,
)
from lib.archive.reader import load_detector
from lib.images import read_images
from lib.paths import SAMPLE_IMAGES

from damoyolo.boxes import decode_predictions
from damoyolo.detector import Detector
from damoyolo.structures import RawPredictions

SEEN_SCORE = 0.25  # an anchor point sees an object at such a score; only its box is of interest

Network = Callable[[Tensor], RawPredictions]


class ParityError(Exception):
    """The backend is wrong, or the images cannot tell."""


@dataclass(frozen=True)
class Tolerances:
    """How far a backend may be from PyTorch in float32.

    score: difference of any score, 0..1. box_px: difference of a side of a box that either of them sees, in
    pixels of the network input. logit_noise: root mean square of the error of a class's logits, as a share of
    their standard deviation. ap: by how much AP may be lower.
    """

    score: float
    box_px: float
    logit_noise: float
    ap: float


# By precision. PyTorch on a CPU in float16 was off by 0.005, 0.5 px and 0.004 at most, in bfloat16 by 0.075,
# 6.5 px and 0.04 (demo weights, 16 BCCD photographs and 3 smears). Those of tf32 and int8 are not measured.
TOLERANCES = {
    "fp32": Tolerances(score=1e-3, box_px=0.1, logit_noise=1e-3, ap=0.001),
    "tf32": Tolerances(score=0.02, box_px=2.0, logit_noise=0.02, ap=0.003),
    "fp16": Tolerances(score=0.02, box_px=2.0, logit_noise=0.02, ap=0.003),
    "amp": Tolerances(score=0.2, box_px=20.0, logit_noise=0.1, ap=0.003),
    "bf16": Tolerances(score=0.2, box_px=20.0, logit_noise=0.1, ap=0.003),
    "int8": Tolerances(score=0.4, box_px=32.0, logit_noise=0.4, ap=0.01),
}


class Parity(NamedTuple):
    """The largest differences found at a batch size, named as in Tolerances; broken says what made it end."""

    batch_size: int
    score: float
    box_px: float
    logit_noise: float
    broken: str | None = None


@dataclass(frozen=True)
class ParityReport:
    """What was measured, and against what.

    unseen_classes: classes that the images do not show, so that only their logits were compared.
    reference_ap, ap: of PyTorch in float32 and of the backend; None without a data set.
    """

    precision: str
    tolerances: Tolerances
    parities: tuple[Parity, ...]
    unseen_classes: tuple[str, ...]
    reference_ap: float | None = None
    ap: float | None = None

    def failures(self) -> list[str]:
        """What is beyond its tolerance, a line each; empty if the backend may be used."""
        found = []
        for parity in self.parities:
            if parity.broken is not None:
                found.append(f"batch size {parity.batch_size}: {parity.broken}")
                continue
            for name in ("score", "box_px", "logit_noise"):
                value, limit = getattr(parity, name), getattr(self.tolerances, name)
                if not value <= limit:  # NaN is beyond too
                    found.append(
                        f"batch size {parity.batch_size}: {name} is off by {value:.4g}, accepted is {limit:g}"
                    )
        if self.ap is None or self.reference_ap is None:
            return found
        if not self.reference_ap - self.ap <= self.tolerances.ap:
            found.append(
                f"AP is {self.ap:.4f}, PyTorch's is {self.reference_ap:.4f}; accepted is "
                f"{self.tolerances.ap:g} lower"
            )
        return found

    def lines(self) -> list[str]:
        """The figures, for people."""
        lines = [
            f"batch size {each.batch_size}: score {each.score:.2e}, box {each.box_px:.2e} px, "
            f"logit noise {each.logit_noise:.2e}"
            for each in self.parities
            if each.broken is None
        ]
        if self.unseen_classes:
            lines.append(f"not in the images, logits compared only: {', '.join(self.unseen_classes)}")
        if self.ap is None:
            lines.append("AP not compared: no data set given")
        else:
            lines.append(f"AP {self.ap:.4f}, PyTorch in float32 {self.reference_ap:.4f}")
        return lines

    def to_mapping(self) -> dict[str, Any]:
        """The figures as plain values."""
        content = dataclasses.asdict(self)
        content["parities"] = [each._asdict() for each in self.parities]
        return {**content, "failures": self.failures()}

    def require_passed(self) -> None:
        """Refuse the backend if anything is beyond its tolerance.

        Raises:
            ParityError: with every failure.
        """
        failures = self.failures()
        if failures:
            raise ParityError(f"the backend differs from PyTorch in float32: {'; '.join(failures)}")


def compare(
    reference: Detector,
    candidate: Detector,
    images: Sequence[bytes],
    batch_sizes: Sequence[int],
    tolerances: Tolerances,
    dataset: DetectionDataset | None = None,
) -> ParityReport:
    """Measure a backend against PyTorch in float32.

    batch_sizes: the smallest and the largest of every range that the backend was built for.

    Raises:
        ParityError: the images show nothing, or one cannot be read.
    """
    batch = reference.preprocessor.prepare(images)
    for index, error in batch.errors.items():
        raise ParityError(f"image {index + 1}: {error}")
    sizes = sorted(set(batch_sizes))
    pixels = with_variations(batch.pixels, sizes[-1])
    expected = [reference.raw_predictions(pixels[index : index + 1]) for index in range(len(pixels))]
    scores = torch.stack([decode_predictions(each)[0].amax(dim=(0, 1)) for each in expected]).amax(dim=0)  # K
    if not (scores > SEEN_SCORE).any():
        raise ParityError(
            f"PyTorch sees nothing in the {len(images)} images (best score {scores.max():.3f}); they can "
            "tell nothing about a backend: --images takes a folder of images with objects"
        )
    names = reference.config.class_names
    report = ParityReport(
        candidate.pipeline.precision,
        tolerances,
        tuple(measure_parity(candidate.raw_predictions, pixels, expected, size) for size in sizes),
        tuple(name for name, score in zip(names, scores, strict=True) if score <= SEEN_SCORE),
    )
    # A wrong backend can make AP slow to compute, or impossible.
    if dataset is None or report.failures():
        return report
    aps = [average_precision(each, dataset) for each in (reference, candidate)]
    return dataclasses.replace(report, reference_ap=aps[0], ap=aps[1])


def with_variations(pixels: Tensor, at_least: int) -> Tensor:
    """Images, then mirrored and shifted ones, so that a backend cannot mix up a batch unseen.

    pixels: (N, 3, H, W). Returns N images, or `at_least` if that is more and 16 variations of each suffice.
    """
    height, width = pixels.shape[2:]
    needed = max(len(pixels), at_least)
    variations: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x.flip(3),
        lambda x: x.flip(2),
        lambda x: torch.roll(x, width // 2, 3),
        lambda x: torch.roll(x, height // 2, 2),
    )
    for vary in variations:
        if len(pixels) < needed:
            pixels = torch.cat((pixels, vary(pixels)))
    return pixels[:needed]


@torch.inference_mode()
def measure_parity(
    network: Network, pixels: Tensor, expected: Sequence[RawPredictions], batch_size: int
) -> Parity:
    """The largest differences of a network from what was expected, over all images in batches of one size.

    pixels: (N, 3, H, W) uint8 on the device. expected: of each image by itself.
    """
    worst = Parity(batch_size, 0.0, 0.0, 0.0)
    for first in range(0, len(pixels), batch_size):
        rows = [(first + row) % len(pixels) for row in range(batch_size)]
        wanted = RawPredictions.joined([expected[row] for row in rows])
        try:
            found = network(pixels[rows])
        except RuntimeError as error:
            return worst._replace(broken=f"the backend fails: {error}")
        broken = _what_is_broken(found, wanted)
        if broken is not None:
            return worst._replace(broken=broken)
        scores, boxes_xyxy = decode_predictions(found)
        wanted_scores, wanted_boxes_xyxy = decode_predictions(wanted)
        seen = torch.maximum(scores, wanted_scores).amax(dim=-1) > SEEN_SCORE  # B, A
        box_differences = (boxes_xyxy - wanted_boxes_xyxy).abs()[seen]
        worst = Parity(
            batch_size,
            max(worst.score, float((scores - wanted_scores).abs().max())),
            max(worst.box_px, float(box_differences.max()) if len(box_differences) else 0.0),
            max(worst.logit_noise, _logit_noise(found.class_logits, wanted.class_logits)),
        )
    return worst


def average_precision(detector: Detector, dataset: DetectionDataset) -> float:
    """AP on a data set (COCO metric; score 0.05, IoU 0.7, 500 boxes).

    Raises:
        ParityError: the data set does not fit, or nothing is found in it.
    """
    try:
        predictions, _ = gather_predictions(
            dataset, detector_predictor(detector, EVALUATION_OPTIONS, 8), None
        )
        return compute_metrics(dataset, predictions).overall.ap
    except (EvaluationError, MetricsError) as error:
        raise ParityError(f"no AP: {error}") from error


def _what_is_broken(found: RawPredictions, wanted: RawPredictions) -> str | None:
    levels = [*found.class_logits, *found.distance_logits]
    wanted_levels = [*wanted.class_logits, *wanted.distance_logits]
    shapes, wanted_shapes = ([tuple(each.shape) for each in side] for side in (levels, wanted_levels))
    if shapes != wanted_shapes:
        return f"the predictions have the shapes {shapes}, PyTorch's have {wanted_shapes}"
    if not all(bool(each.isfinite().all()) for each in levels):
        return "the predictions are not finite"
    return None


def _logit_noise(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Of the worst class; finds a class that is lost even if no image shows one."""
    columns, wanted_columns = (
        torch.cat([level.float().transpose(0, 1).flatten(1) for level in side], dim=1)
        for side in (found, wanted)
    )  # K, B * A
    noise = (columns - wanted_columns).square().mean(dim=1).sqrt()
    return float((noise / wanted_columns.std(dim=1).clamp(min=1e-6)).max())


def load_pair(archive: Path, device: torch.device) -> tuple[Detector, Detector]:
    """PyTorch in float32 with the weights of an archive, and the archive as it stands.

    Raises:
        DamoYoloError: it does not load.
    """
    plain = {"backend": "pytorch", "precision": "fp32", "cuda_graphs": False}
    return load_detector(archive, device, **plain), load_detector(archive, device)


def add_parity_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the comparison, for every script that has one."""
    group = parser.add_argument_group("accuracy gate (tolerances: those of the precision unless given)")
    group.add_argument(
        "--images",
        type=Path,
        default=SAMPLE_IMAGES,
        metavar="DIR",
        help="JPEG files whose raw predictions are compared (%(default)s)",
    )
    group.add_argument("--voc", type=Path, metavar="DIR", help="data set in Pascal-VOC form to compare AP on")
    group.add_argument("--split", default="test", help="list of ImageSets/Main to take (%(default)s)")
    group.add_argument("--coco", type=Path, metavar="FILE", help="instances file of one in COCO form")
    group.add_argument("--coco-images", type=Path, metavar="DIR", help="folder of the images of --coco")
    for field in dataclasses.fields(Tolerances):
        group.add_argument(f"--{field.name.replace('_', '-')}-tolerance", type=float, metavar="MOST")
    group.add_argument("--report", type=Path, metavar="FILE", help="write all figures as JSON")


def chosen_tolerances(arguments: argparse.Namespace, precision: str) -> Tolerances:
    """Those of the precision, with what the options change."""
    given = {
        field.name: value
        for field in dataclasses.fields(Tolerances)
        if (value := getattr(arguments, f"{field.name}_tolerance")) is not None
    }
    return dataclasses.replace(TOLERANCES[precision], **given)


def chosen_dataset(arguments: argparse.Namespace) -> DetectionDataset | None:
    """The data set that the options name, or None.

    Raises:
        DatasetError: it cannot be read, or two are named.
    """
    if arguments.voc is not None and arguments.coco is not None:
        raise DatasetError("two data sets are given; give one of --voc and --coco")
    if (arguments.coco is None) != (arguments.coco_images is None):
        raise DatasetError("--coco and --coco-images belong together")
    if arguments.voc is not None:
        return read_voc(arguments.voc, arguments.split)
    return None if arguments.coco is None else read_coco(arguments.coco, arguments.coco_images)


class Evidence(NamedTuple):
    """What backends are compared on: JPEG files, and a data set for AP."""

    images: list[bytes]
    dataset: DetectionDataset | None


def read_evidence(arguments: argparse.Namespace) -> Evidence:
    """What the options of `add_parity_arguments` name.

    Raises:
        DatasetError, OSError: it cannot be read.
    """
    return Evidence(read_images(arguments.images), chosen_dataset(arguments))


def require_enough(evidence: Evidence, precision: str) -> None:
    """Refuse evidence that cannot prove a backend of this precision.

    Raises:
        ParityError: it is int8, and there is no data set.
    """
    if precision == "int8" and evidence.dataset is None:
        raise ParityError(
            "the raw predictions of an int8 backend differ too much to prove anything; give a data set to "
            "compare AP on: --voc DIR, or --coco FILE --coco-images DIR"
        )


def check_parity(
    archive: Path,
    device: torch.device,
    batch_sizes: Sequence[int],
    arguments: argparse.Namespace,
    evidence: Evidence,
) -> None:
    """Compare as the options of `add_parity_arguments` say, print the figures, write the report.

    Raises:
        ParityError, DamoYoloError, DatasetError, OSError: the backend must not be used.
    """
    reference, candidate = load_pair(archive, device)
    precision = candidate.pipeline.precision
    require_enough(evidence, precision)
    tolerances = chosen_tolerances(arguments, precision)
    report = compare(reference, candidate, evidence.images, batch_sizes, tolerances, evidence.dataset)
    for detector in (reference, candidate):
        detector.close()
    print("\n".join(report.lines()))
    if arguments.report is not None:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        arguments.report.write_text(json.dumps(report.to_mapping(), indent=2) + "\n")
    report.require_passed()


LIKELY_SCORE = 0.05  # boxes below it answer no request, and wander most


@dataclass(frozen=True)
class Agreement:
    """Largest differences from the network in float32: of scores, and of likely boxes in pixels."""

    score_difference: float
    box_difference_px: float


def compare_decoded(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Agreement:
    """How far scores (B, A, K) and boxes (B, A, 4) of all anchor points lie from those expected."""
    (scores, boxes_xyxy), (expected_scores, expected_boxes_xyxy) = found, expected
    likely = expected_scores.amax(dim=-1) > LIKELY_SCORE  # B, A
    off_px = (boxes_xyxy - expected_boxes_xyxy)[likely].abs()
    return Agreement(
        float((scores - expected_scores).abs().max()), float(off_px.max()) if likely.any() else 0.0
    )
