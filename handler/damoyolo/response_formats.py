"""Write an answer in the format of its request, unless it is drawn: JSON, or what other projects read.

Every format has the boxes and scores of the JSON: clipped to the image, boxes to 2 decimals of a pixel,
scores to 6 decimals. docs/output-formats.md shows each format with the code that reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from damoyolo.coco_categories import coco_category_ids
from damoyolo.response import OutputFormat, clipped_boxes_xyxy, format_json, format_json_predictions
from damoyolo.structures import Detections

# The largest whole number that every reader of JSON keeps: JavaScript's numbers are float64.
MAX_IMAGE_ID = 2**53


def format_answer(
    batch: Sequence[Detections],
    class_names: Sequence[str],
    output_format: OutputFormat,
    *,
    batched: bool,
    image_id: int,
) -> bytes:
    """The body of an answer.

    batch: the images of the request, only one for format "yolo".
    output_format: one that is not drawn.
    batched: as in `ImageRequest`; COCO results are a list of all images either way.
    image_id: of the first image in COCO results; each further image has the next number.
    """
    if output_format == "json":
        return format_json_predictions(batch, class_names) if batched else format_json(batch[0], class_names)
    if output_format == "yolo":
        return _yolo_text(batch[0]).encode("ascii")
    if output_format == "coco":
        ids = coco_category_ids(class_names)
        return _compact_json(
            [
                entry
                for number, detections in enumerate(batch, start=image_id)
                for entry in _coco_results(detections, ids, number)
            ]
        )
    write = _arrays if output_format == "arrays" else _supervision
    answers = [write(detections, class_names) for detections in batch]
    return _compact_json({"predictions": answers} if batched else answers[0])


class _Found(NamedTuple):
    """A detection, rounded like in the JSON.

    corners: x1, y1, x2, y2 in hundredths of a pixel: whole numbers, so that widths and centres stay exact.
    """

    class_id: int
    score: float
    corners: tuple[int, int, int, int]


def _rounded(detections: Detections) -> list[_Found]:
    # A float32 times 100 is exact in float64, so the rounding is that of the number itself.
    hundredths = np.rint(clipped_boxes_xyxy(detections).astype(np.float64) * 100).astype(np.int64)  # N,4
    return [
        _Found(class_id, round(score, 6), corners)
        for class_id, score, corners in zip(
            detections.class_ids.tolist(),
            np.nan_to_num(detections.scores).tolist(),
            hundredths.tolist(),
            strict=True,
        )
    ]


def _coco_results(detections: Detections, category_ids: Sequence[int], image_id: int) -> list[dict[str, Any]]:
    """COCO's results format: https://cocodataset.org/#format-results."""
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[class_id],
            "bbox": [x1 / 100, y1 / 100, (x2 - x1) / 100, (y2 - y1) / 100],
            "score": score,
        }
        for class_id, score, (x1, y1, x2, y2) in _rounded(detections)
    ]


def _arrays(detections: Detections, class_names: Sequence[str]) -> dict[str, Any]:
    """A list for each property instead of an object for each detection."""
    height, width = detections.image_size_hw
    found = _rounded(detections)
    return {
        "width": width,
        "height": height,
        "boxes": [[side / 100 for side in each.corners] for each in found],
        "scores": [each.score for each in found],
        "class_ids": [each.class_id for each in found],
        "labels": [class_names[each.class_id] for each in found],
    }


def _supervision(detections: Detections, class_names: Sequence[str]) -> dict[str, Any]:
    """What Roboflow's inference answers, and `supervision.Detections.from_inference` reads."""
    height, width = detections.image_size_hw
    return {
        "image": {"width": width, "height": height},
        "predictions": [
            {
                "x": (x1 + x2) / 200,
                "y": (y1 + y2) / 200,
                "width": (x2 - x1) / 100,
                "height": (y2 - y1) / 100,
                "confidence": score,
                "class": class_names[class_id],
                "class_id": class_id,
            }
            for class_id, score, (x1, y1, x2, y2) in _rounded(detections)
        ],
    }


def _yolo_text(detections: Detections) -> str:
    """A line `class_id x_centre y_centre width height confidence` for each, in shares of the image.

    As Ultralytics writes it with `save_txt` and `save_conf`; 6 decimals.
    """
    height, width = detections.image_size_hw
    return "".join(
        f"{class_id} {(x1 + x2) / (200 * width):.6f} {(y1 + y2) / (200 * height):.6f} "
        f"{(x2 - x1) / (100 * width):.6f} {(y2 - y1) / (100 * height):.6f} {score:.6f}\n"
        for class_id, score, (x1, y1, x2, y2) in _rounded(detections)
    )


def _compact_json(answer: Any) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode("ascii")
