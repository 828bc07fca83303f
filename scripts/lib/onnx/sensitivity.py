"""Measure how INT8 changes the results of a network, block by block.

Two measures, on images that were not used for calibration and need no annotations:

drift   Over all anchor points and classes that either network scores above 0.05: the change of the score,
        plus the score times the fraction of the box that moved away (1 - IoU), relative to the sum of scores.
        Having no matching and no IoU steps, it separates blocks with tiny effects.
loss    AP lost, with the confident detections of the float32 network as ground truth, their sides jittered
        as much as annotators differ. Without the jitter float32 would be perfect, and a shift by one pixel,
        which no annotation would show, would count as a loss.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from lib.accuracy.coco_metrics import CocoPrediction, compute_metrics
from lib.accuracy.datasets import AnnotatedImage, AnnotatedObject, DetectionDataset, is_large_enough
from lib.accuracy.predictors import EVALUATION_OPTIONS
from lib.cli import ScriptError
from lib.onnx.options import Target
from lib.onnx.qdq import Block, Ranges, quantize_blocks

from damoyolo.backends.onnx_metadata import INPUT_NAME, OUTPUT_NAMES, as_predictions
from damoyolo.boxes import decode_predictions
from damoyolo.config import ServingConfig
from damoyolo.postprocess import postprocess
from damoyolo.structures import Detections

LIKELY_SCORE = EVALUATION_OPTIONS.score_threshold  # lower scores count nowhere in the evaluation
CONFIDENT_SCORE = 0.5
# Standard deviation of a side, relative to the box's width or height. The demo network's AP is 0.71 with this
# ground truth, and 0.63 with annotations.
BOX_JITTER = 0.05
JITTER_REPEATS = 4  # jittered copies of each image, to average over the jitter
BATCH_SIZE = 4


@dataclass(frozen=True)
class Deviation:
    """How far a network is from its float32 original; see the top of the file."""

    drift: float
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """The effect of quantising one block alone."""

    block: Block
    deviation: Deviation


@dataclass(frozen=True)
class _Predictions:
    """Of all images: decoded, (N, A, K) and (N, A, 4), and after NMS."""

    scores: Tensor
    boxes_xyxy: Tensor
    detections: list[Detections]


class QuantizationEvaluator:
    """Measures the deviation of quantised networks from one float32 network, on the same images.

    network: in float32, as scripts/export_onnx.py writes it. pixels: (N, 3, H, W) uint8 RGB.

    Raises:
        ScriptError: there are no images, or the network detects nothing in them with confidence.
    """

    def __init__(self, network: onnx.ModelProto, pixels: NDArray[np.uint8]) -> None:
        if not len(pixels):
            raise ScriptError("there are no images to compare on; accepted is at least one")
        self._pixels = pixels
        self._reference = _predict(network, pixels)
        self._truth = _jittered_truth(self._reference.detections)
        if not self._truth.object_count:
            raise ScriptError(
                f"the float32 network finds nothing above a score of {CONFIDENT_SCORE} in the {len(pixels)} "
                "images to compare on; accepted are images like those that it will be served with"
            )
        self.reference_ap = self._average_precision(self._reference.detections)

    def deviation_of(self, network: onnx.ModelProto) -> Deviation:
        """How far a network with the same inputs and outputs is from the float32 network."""
        found = _predict(network, self._pixels)
        return Deviation(
            _drift(self._reference, found),
            self.reference_ap - self._average_precision(found.detections),
        )

    def _average_precision(self, detections: Sequence[Detections]) -> float:
        if not any(map(len, detections)):  # a network so broken that it detects nothing
            return 0.0
        predictions: list[CocoPrediction] = []
        for image in self._truth.images:
            found = detections[image.image_id % len(detections)]
            boxes = found.boxes_xyxy.astype(np.float64)
            boxes[:, 2:] -= boxes[:, :2]  # x, y, width, height
            predictions += [
                {"image_id": image.image_id, "category_id": class_id, "bbox": box, "score": score}
                for box, score, class_id in zip(
                    boxes.tolist(), found.scores.tolist(), found.class_ids.tolist(), strict=True
                )
            ]
        return compute_metrics(self._truth, predictions).overall.ap


def measure_blocks(
    network: onnx.ModelProto,
    ranges: Ranges,
    blocks: Iterable[Block],
    evaluator: QuantizationEvaluator,
    target: Target = "openvino",
) -> list[Sensitivity]:
    """The effect of each block when only it is quantised; the most sensitive first."""
    found = [
        Sensitivity(block, evaluator.deviation_of(quantize_blocks(network, ranges, [block], target)))
        for block in blocks
    ]
    # A stable sort keeps equal drifts in execution order.
    return sorted(found, key=lambda each: -each.deviation.drift)


def fewest_kept(count: int, loss_of: Callable[[int], float], max_loss: float) -> int:
    """The smallest number k in 0..count with `loss_of(k)` at most `max_loss`, by bisection.

    count: number of blocks that could stay float32. loss_of: the loss when the k most sensitive do; assumed
        to fall with k, and to be 0 at `count`, for which it is not called.
    """
    if loss_of(0) <= max_loss:
        return 0
    return bisect.bisect_left(range(count), True, 1, count, key=lambda kept: loss_of(kept) <= max_loss)


def open_session(network: onnx.ModelProto) -> Any:
    """An onnxruntime session of a network in memory, on the CPU, with as many threads as PyTorch uses."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(
        network.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _predict(network: onnx.ModelProto, pixels: NDArray[np.uint8]) -> _Predictions:
    session = open_session(network)
    size_hw = (pixels.shape[2], pixels.shape[3])
    scores: list[Tensor] = []
    boxes_xyxy: list[Tensor] = []
    detections: list[Detections] = []
    for first in range(0, len(pixels), BATCH_SIZE):
        batch = pixels[first : first + BATCH_SIZE]
        outputs = session.run(list(OUTPUT_NAMES), {INPUT_NAME: batch})
        raw = as_predictions([torch.from_numpy(output) for output in outputs])
        for values, decoded in zip((scores, boxes_xyxy), decode_predictions(raw), strict=True):
            values.append(decoded)
        detections += postprocess(
            raw,
            [EVALUATION_OPTIONS] * len(batch),
            [size_hw] * len(batch),
            size_hw,
            ServingConfig().max_candidates,
        )
    return _Predictions(torch.cat(scores), torch.cat(boxes_xyxy), detections)


def _drift(reference: _Predictions, found: _Predictions) -> float:
    likely = torch.maximum(reference.scores, found.scores) > LIKELY_SCORE  # N, A, K
    moved = 1 - _overlap(reference.boxes_xyxy, found.boxes_xyxy)[..., None]  # N, A, 1
    changes = (found.scores - reference.scores).abs() + reference.scores * moved
    return float(changes[likely].sum() / reference.scores[likely].sum())


def _overlap(boxes_a_xyxy: Tensor, boxes_b_xyxy: Tensor) -> Tensor:
    """IoU of each pair of boxes, (..., 4) and (..., 4) to (...)."""

    def area(boxes: Tensor) -> Tensor:
        sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
        return sides[..., 0] * sides[..., 1]

    left_top = torch.maximum(boxes_a_xyxy[..., :2], boxes_b_xyxy[..., :2])
    right_bottom = torch.minimum(boxes_a_xyxy[..., 2:], boxes_b_xyxy[..., 2:])
    both = area(torch.cat((left_top, right_bottom), dim=-1))
    return both / (area(boxes_a_xyxy) + area(boxes_b_xyxy) - both).clamp(min=1e-6)


def _jittered_truth(detections: Sequence[Detections]) -> DetectionDataset:
    """Confident detections as jittered annotations; image i has those of detections[i % len(detections)]."""
    random = np.random.default_rng(0)
    images = []
    for image_id in range(JITTER_REPEATS * len(detections)):
        found = detections[image_id % len(detections)]
        sides = found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2]
        jitter = BOX_JITTER * random.standard_normal(found.boxes_xyxy.shape)
        boxes_xyxy = found.boxes_xyxy + jitter * np.tile(sides, 2)  # width, height, width, height
        objects = [
            AnnotatedObject(class_id, (x1, y1, x2, y2))
            for (x1, y1, x2, y2), score, class_id in zip(
                boxes_xyxy.tolist(), found.scores, found.class_ids.tolist(), strict=True
            )
            if score > CONFIDENT_SCORE and is_large_enough((x1, y1, x2, y2))
        ]
        images.append(AnnotatedImage(image_id, Path(), tuple(objects)))
    class_ids = {int(class_id) for found in detections for class_id in found.class_ids}
    names = {class_id: str(class_id) for class_id in sorted(class_ids)}
    return DetectionDataset("detections of the float32 network", names, tuple(images), dropped_objects=0)
