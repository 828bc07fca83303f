"""Whether two answers to the same image agree, but for rounding. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib.accuracy.tolerances import TOLERANCES

ROUNDING_PX = 0.01  # answers have two decimals
# By how much the overlap of two boxes may change: of boxes of 20 pixels, every side of which moves by half a
# pixel, the most that was seen in float16.
OVERLAP_CHANGE = 0.1


@dataclass(frozen=True)
class Rules:
    """The limits that a request's options set, and how far rounding may move what is compared with them.

    The defaults are those of a request without options, for a network in 16 bits and an image of at most its
    input size.

    score: the tolerance of a score. box_px: of a side of a box, in pixels of the image.
    """

    score_threshold: float = 0.25
    iou_threshold: float = 0.45
    max_detections: int = 300
    class_agnostic: bool = False
    score: float = TOLERANCES["fp16"].score
    box_px: float = TOLERANCES["fp16"].box_px


DEFAULT_RULES = Rules()


def differences(
    found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]], rules: Rules = DEFAULT_RULES
) -> list[str]:
    """Where the detections of an answer differ from those expected by more than rounding explains.

    Detections of a label match if score and box are within the tolerances. One that has no match is explained
    if its score is near the threshold or near the last of a list that is cut off, or if the other answer has
    a box that suppresses it or nearly does, and that itself has a match.

    found, expected: `label`, `score`, `bbox` (x1, y1, x2, y2 in pixels), at most max_detections of each.
    """
    left = list(expected)
    matched: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    alone = []
    for each in found:
        same = [other for other in left if other["label"] == each["label"]]
        match = min(same, key=lambda other: _distance(other, each), default=None)
        if match is not None and _agree(match, each, rules):
            left.remove(match)
            matched.append((each, match))
        else:
            alone.append(each)
    found_matches, expected_matches = [each for each, _ in matched], [match for _, match in matched]
    new = [each for each in alone if not _explained(each, expected, expected_matches, rules)]
    missing = [each for each in left if not _explained(each, found, found_matches, rules)]
    return [f"{_shown(each)} was not expected" for each in new] + [
        f"{_shown(each)} is missing" for each in missing
    ]


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes, x1, y1, x2, y2."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared) if shared else 0.0


def _agree(first: Mapping[str, Any], second: Mapping[str, Any], rules: Rules) -> bool:
    return (
        _distance(first, second) <= rules.box_px + ROUNDING_PX
        and abs(first["score"] - second["score"]) <= rules.score
    )


def _explained(
    each: Mapping[str, Any],
    other: Sequence[Mapping[str, Any]],
    matched: Sequence[Mapping[str, Any]],
    rules: Rules,
) -> bool:
    """Whether rounding explains that a detection is not in the other answer.

    matched: those of the other answer that have a match.
    """
    limit = rules.score_threshold
    if len(other) >= rules.max_detections:
        limit = max(limit, min(it["score"] for it in other))
    if each["score"] <= limit + rules.score:
        return True
    return any(
        overlap(each["bbox"], it["bbox"]) >= rules.iou_threshold - OVERLAP_CHANGE
        for it in matched
        if rules.class_agnostic or it["label"] == each["label"]
    )


def _distance(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    return max((abs(a - b) for a, b in zip(first["bbox"], second["bbox"], strict=True)), default=math.inf)


def _shown(found: Mapping[str, Any]) -> str:
    box = ", ".join(f"{side:.1f}" for side in found["bbox"])
    return f"{found['label']} {found['score']:.3f} at [{box}]"
