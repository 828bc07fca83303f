"""Box arithmetic: anchor points and the decoding of raw predictions.

Everything is computed in float32 whatever the input, also under autocast: there is no matrix product here
that autocast could run in half precision.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from damoyolo.structures import RawPredictions

STRIDES = (8, 16, 32)


def anchor_points(
    level_sizes_hw: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | str
) -> Tensor:
    """The points that distances are measured from: top-left corners of the cells, no half-cell offset.

    Returns:
        (A, 2) float32, x and y in pixels of the network input; levels in the order given, row by row within a
        level. The tensor is shared by all callers: do not write into it.
    """
    sizes = tuple((int(height), int(width)) for height, width in level_sizes_hw)
    return _cached_anchor_points(sizes, tuple(strides), torch.device(device))


# Unbounded, so that an entry whose address a CUDA graph has recorded is never freed; a server has one input
# size or a few.
@functools.cache
def _cached_anchor_points(
    level_sizes_hw: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device
) -> Tensor:
    # Built on the host and copied: the copy is complete when it returns, so that no other stream or thread
    # can read it too early, and a first call during a graph capture fails loudly instead of storing memory
    # that only a replay fills. Outside inference mode, so that autograd can use it as well.
    with torch.inference_mode(False):
        levels = []
        for (height, width), stride in zip(level_sizes_hw, strides, strict=True):
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            levels.append(torch.stack((x, y), dim=-1).reshape(-1, 2) * stride)  # h * w, 2
        return torch.cat(levels).to(torch.float32).to(device)  # A, 2


def class_scores(class_logits: Sequence[Tensor]) -> Tensor:
    """Scores of all levels, (B, A, K) float32 in 0..1, from (B, K, h, w) logits per level."""
    levels = [logits.permute(0, 2, 3, 1).flatten(1, 2) for logits in class_logits]  # B, h * w, K
    return torch.cat(levels, dim=1).float().sigmoid_()


def boxes_from_distances(distance_logits: Tensor, points_xy: Tensor, stride: int) -> Tensor:
    """Boxes of one level: the expected bin of each side, times the stride, off the anchor point.

    Args:
        distance_logits: (..., 4 * (R + 1)), sides left, top, right, bottom, any floating dtype.
        points_xy: (..., 2) float32, anchor points in pixels.

    Returns:
        (..., 4) float32 x1, y1, x2, y2 in pixels of the network input, not clipped.
    """
    bin_count = distance_logits.shape[-1] // 4
    logits = distance_logits.reshape(*distance_logits.shape[:-1], 4, bin_count)  # ..., 4, R + 1
    probabilities = logits.float().softmax(dim=-1)
    bins = torch.arange(bin_count, dtype=torch.float32, device=logits.device)
    distances = (probabilities * bins).sum(dim=-1) * stride  # ..., 4
    left_top, right_bottom = distances.chunk(2, dim=-1)
    return torch.cat((points_xy - left_top, points_xy + right_bottom), dim=-1)


def decode_predictions(raw: RawPredictions, strides: Sequence[int] = STRIDES) -> tuple[Tensor, Tensor]:
    """The readable reference: decodes every anchor (DAMO-YOLO, arXiv 2211.15444, ZeroHead).

    Returns:
        scores (B, A, K) float32 in 0..1, and boxes_xyxy (B, A, 4) float32 in pixels of the network input,
        not clipped; anchors ordered as in `anchor_points`.
    """
    boxes = []
    for logits, stride in zip(raw.distance_logits, strides, strict=True):
        height, width = logits.shape[-2:]
        points = anchor_points([(height, width)], [stride], logits.device)  # h * w, 2
        boxes.append(boxes_from_distances(logits.permute(0, 2, 3, 1).flatten(1, 2), points, stride))
    return class_scores(raw.class_logits), torch.cat(boxes, dim=1)
