"""Compare a backend with PyTorch in float32: raw predictions of images, and AP on a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib.accuracy.coco_metrics import compute_metrics
from lib.accuracy.datasets import DetectionDataset
from lib.accuracy.predictors import EVALUATION_OPTIONS, detector_predictor, gather_predictions
from lib.accuracy.tolerances import Tolerances
from lib.archive.reader import load_detector
from lib.cli import ScriptError

from damoyolo.boxes import decode_predictions
from damoyolo.detector import Detector
from damoyolo.structures import RawPredictions

SEEN_SCORE = 0.25  # an anchor point detects an object at this score; only then its box matters
LIKELY_SCORE = 0.05  # boxes with lower scores are never returned, and vary the most

Network = Callable[[Tensor], RawPredictions]


class Parity(NamedTuple):
    """The largest differences at a batch size, named as in Tolerances.

    broken: why the comparison ended early, or None.
    """

    batch_size: int
    score: float
    box_px: float
    logit_noise: float
    broken: str | None = None


@dataclass(frozen=True)
class ParityReport:
    """The measured differences and the tolerances.

    unseen_classes: classes that PyTorch does not detect in the images, so that only their logits count.
    reference_ap, ap: of PyTorch in float32 and of the backend; None without a data set.
    """

    precision: str
    tolerances: Tolerances
    parities: tuple[Parity, ...]
    unseen_classes: tuple[str, ...]
    reference_ap: float | None = None
    ap: float | None = None

    def failures(self) -> list[str]:
        """One message for each exceeded tolerance; empty if the backend may be used."""
        found = []
        for parity in self.parities:
            if parity.broken is not None:
                found.append(f"batch size {parity.batch_size}: {parity.broken}")
                continue
            for name in ("score", "box_px", "logit_noise"):
                value, limit = getattr(parity, name), getattr(self.tolerances, name)
                if not value <= limit:  # NaN fails too
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
        """The figures as text."""
        lines = [
            f"batch size {each.batch_size}: score {each.score:.2e}, box {each.box_px:.2e} px, "
            f"logit noise {each.logit_noise:.2e}"
            for each in self.parities
            if each.broken is None
        ]
        if self.unseen_classes:
            lines.append(
                f"not detected in the images, so only logits compared: {', '.join(self.unseen_classes)}"
            )
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
        """Refuse the backend if it exceeds a tolerance.

        Raises:
            ScriptError: lists every failure.
        """
        if failures := self.failures():
            raise ScriptError(f"the backend differs from PyTorch in float32: {'; '.join(failures)}")


def compare(
    reference: Detector,
    candidate: Detector,
    images: Sequence[bytes],
    batch_sizes: Sequence[int],
    tolerances: Tolerances,
    dataset: DetectionDataset | None = None,
) -> ParityReport:
    """Compare the backend of `candidate` with `reference`, which is PyTorch in float32.

    images: encoded. batch_sizes: the smallest and the largest of every range that the backend was built for.

    Raises:
        ScriptError: nothing is detected in the images or the data set, or an image cannot be read.
    """
    batch = reference.preprocessor.prepare(images)
    for index, error in batch.errors.items():
        raise ScriptError(f"image {index + 1}: {error}")
    sizes = sorted(set(batch_sizes))
    pixels = with_variations(batch.pixels, sizes[-1])
    expected = [reference.raw_predictions(pixels[index : index + 1]) for index in range(len(pixels))]
    scores = torch.stack([decode_predictions(each)[0].amax(dim=(0, 1)) for each in expected]).amax(dim=0)  # K
    if not (scores > SEEN_SCORE).any():
        raise ScriptError(
            f"PyTorch detects nothing in the {len(images)} images (best score {scores.max():.3f}), so they "
            "cannot prove a backend; --images takes a folder of images with objects"
        )
    names = reference.config.class_names
    report = ParityReport(
        candidate.pipeline.precision,
        tolerances,
        tuple(measure_parity(candidate.raw_predictions, pixels, expected, size) for size in sizes),
        tuple(name for name, score in zip(names, scores, strict=True) if score <= SEEN_SCORE),
    )
    # With a wrong backend, AP can take long or be impossible to compute.
    if dataset is None or report.failures():
        return report
    aps = [average_precision(each, dataset) for each in (reference, candidate)]
    return dataclasses.replace(report, reference_ap=aps[0], ap=aps[1])


def with_variations(pixels: Tensor, at_least: int) -> Tensor:
    """The images, followed by mirrored and shifted ones, so that mixing up the images of a batch shows.

    pixels: (N, 3, H, W). Returns N images or `at_least`, whichever is more, but at most 16 * N.
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
    """The largest differences of a network over all images, in batches of one size.

    pixels: (N, 3, H, W) uint8 on the device. expected: predictions for each image alone.
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
        worst = Parity(
            batch_size,
            max(worst.score, _largest(scores - wanted_scores)),
            max(worst.box_px, _largest((boxes_xyxy - wanted_boxes_xyxy)[seen])),
            max(worst.logit_noise, _logit_noise(found.class_logits, wanted.class_logits)),
        )
    return worst


def average_precision(detector: Detector, dataset: DetectionDataset) -> float:
    """AP on a data set (COCO metric; score 0.05, IoU 0.7, 500 boxes).

    Raises:
        ScriptError: the data set has other classes, or nothing is detected in it.
    """
    predictions, _ = gather_predictions(dataset, detector_predictor(detector, EVALUATION_OPTIONS, 8), None)
    return compute_metrics(dataset, predictions).overall.ap


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
    """Of the worst class; detects a lost class even if no image shows it."""
    columns, wanted_columns = (
        torch.cat([level.float().transpose(0, 1).flatten(1) for level in side], dim=1)
        for side in (found, wanted)
    )  # K, B * A
    noise = (columns - wanted_columns).square().mean(dim=1).sqrt()
    return float((noise / wanted_columns.std(dim=1).clamp(min=1e-6)).max())


def load_pair(archive: Path, device: torch.device) -> tuple[Detector, Detector]:
    """PyTorch in float32 with the weights of an archive, and the archive with its own settings.

    Raises:
        DamoYoloError: it does not load.
    """
    plain = {"backend": "pytorch", "precision": "fp32", "cuda_graphs": False}
    return load_detector(archive, device, **plain), load_detector(archive, device)


@dataclass(frozen=True)
class Agreement:
    """Largest differences from the network in float32: of scores, and of likely boxes in pixels."""

    score_difference: float
    box_difference_px: float


def compare_decoded(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Agreement:
    """Compare decoded predictions: scores (B, A, K) and boxes_xyxy (B, A, 4) of all anchor points."""
    (scores, boxes_xyxy), (expected_scores, expected_boxes_xyxy) = found, expected
    likely = expected_scores.amax(dim=-1) > LIKELY_SCORE  # B, A
    return Agreement(_largest(scores - expected_scores), _largest((boxes_xyxy - expected_boxes_xyxy)[likely]))


def _largest(differences: Tensor) -> float:
    return float(differences.abs().max()) if differences.numel() else 0.0
