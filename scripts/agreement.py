"""How far an engine's predictions lie from those of the network in float32."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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
