"""Turn raw predictions into detections: threshold, decode the candidates, NMS, scale back; a batch at a time.

The images of a batch may carry different options. Candidates are found and decoded on the device of the
predictions; NMS runs on the host, so that it rounds alike for every device. On CUDA this is the reference and
takes the images that are too crowded for `cuda.postprocess`; it waits for the device several times per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from damoyolo.boxes import STRIDES, boxes_from_distances, class_scores
from damoyolo.preprocess import scale_factors_xyxy
from damoyolo.structures import DetectionOptions, Detections, RawPredictions


class Selection(NamedTuple):
    """Boxes of a batch on the host: images ascending, within an image scores descending.

    Equal scores are in the order of anchor * K + class.
    """

    image_ids: Tensor  # (N,) int64
    class_ids: Tensor  # (N,) int64
    scores: Tensor  # (N,) float32
    boxes_xyxy: Tensor  # (N, 4) float32, pixels of the network input


class _Candidates(NamedTuple):
    """(Anchor, class) pairs above the threshold on the device, in the order of `Selection`."""

    image_ids: Tensor  # (M,) int64
    anchor_ids: Tensor  # (M,) int64
    class_ids: Tensor  # (M,) int64
    scores: Tensor  # (M,) float32


def postprocess(
    raw: RawPredictions,
    options: Sequence[DetectionOptions],
    image_sizes_hw: Sequence[tuple[int, int]],
    input_size_hw: tuple[int, int],
    max_candidates: int,
) -> list[Detections]:
    """The detections of each image of a batch; float32 whatever the dtype of the predictions.

    Args:
        raw: predictions of B images at strides 8, 16, 32.
        options: one per image.
        image_sizes_hw: original height and width of each image in pixels.
        input_size_hw: height and width of the network input in pixels.
        max_candidates: at most this many (anchor, class) pairs of an image, the best, enter NMS.

    Returns:
        B detections; boxes are scaled to the original image and not clipped to it. Boxes that are not
        finite are left out.

    Raises:
        ValueError: there is not one option and one image size per image.
    """
    scores = class_scores(raw.class_logits)  # B, A, K
    if len(image_sizes_hw) != len(scores):
        raise ValueError(f"{len(image_sizes_hw)} image sizes for {len(scores)} images; each needs one")
    candidates = _find_candidates(scores, options, max_candidates)
    boxes_xyxy = _decode_candidates(raw.distance_logits, candidates)
    selection = _keep_best(candidates, boxes_xyxy, options, class_count=scores.shape[-1])
    return _per_image(selection, image_sizes_hw, input_size_hw)


def select(
    scores: Tensor, boxes_xyxy: Tensor, options: Sequence[DetectionOptions], max_candidates: int
) -> Selection:
    """The same selection from predictions that are decoded already.

    Args:
        scores: (B, A, K) float32 in 0..1.
        boxes_xyxy: (B, A, 4) float32 in pixels of the network input.
        options: one per image.
        max_candidates: at most this many (anchor, class) pairs of an image, the best, enter NMS.

    Raises:
        ValueError: there is not one option per image.
    """
    candidates = _find_candidates(scores, options, max_candidates)
    candidate_boxes = boxes_xyxy[candidates.image_ids, candidates.anchor_ids]  # M, 4
    return _keep_best(candidates, candidate_boxes, options, class_count=scores.shape[-1])


def nms_per_group(boxes_xyxy: Tensor, group_ids: Tensor, iou_thresholds_per_group: Tensor) -> Tensor:
    """Greedy NMS inside each group, by calling torchvision.ops.nms for every group by itself.

    Boxes keep their coordinates. The usual trick of shifting each group to a region of its own, to need one
    call only, rounds float32 coordinates and with them the IoU.

    A box is dropped if its IoU with a better kept box of its group is strictly above the group's threshold,
    both in float32.

    Args:
        boxes_xyxy: (M, 4) float32 on the CPU, the best first: in order of descending score.
        group_ids: (M,) int64 in 0..G-1.
        iou_thresholds_per_group: (G,) float32.

    Returns:
        (M,) bool, which boxes stay.
    """
    order = group_ids.sort(stable=True).indices  # groups ascending, within a group the best first
    sorted_boxes = boxes_xyxy[order]
    sizes = group_ids.bincount(minlength=len(iou_thresholds_per_group))  # G
    starts = sizes.cumsum(0) - sizes
    # In place of the scores: without equal values the order cannot depend on how torchvision sorts.
    descending = torch.arange(len(order), 0, -1, dtype=torch.float32)
    kept_rows = [starts[sizes == 1]]
    several = torch.stack((starts, sizes), dim=1)[sizes > 1].tolist()
    for (start, size), iou_threshold in zip(
        several, iou_thresholds_per_group[sizes > 1].tolist(), strict=True
    ):
        group_boxes = sorted_boxes[start : start + size]
        kept_rows.append(start + nms(group_boxes, descending[-size:], iou_threshold))
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[torch.cat(kept_rows)]] = True
    return kept


def _find_candidates(scores: Tensor, options: Sequence[DetectionOptions], max_candidates: int) -> _Candidates:
    """Pairs strictly above their image's threshold, of its classes; the best `max_candidates` per image."""
    B, A, K = scores.shape
    if len(options) != B:
        raise ValueError(f"{len(options)} options for {B} images; each needs one")
    thresholds = np.full((B, 1, K), np.inf, dtype=np.float32)  # above every score: class not requested
    for row, option in zip(thresholds[:, 0], options, strict=True):
        row[slice(None) if option.class_ids is None else list(option.class_ids)] = option.score_threshold

    above = scores > torch.from_numpy(thresholds).to(scores.device)  # B, A, K; NaN is not above
    flat_ids = above.flatten().nonzero().squeeze(1)  # M
    candidate_scores = scores.flatten()[flat_ids]
    image_ids = flat_ids // (A * K)
    order = candidate_scores.sort(descending=True, stable=True).indices
    order = order[image_ids[order].sort(stable=True).indices]  # images ascending, then scores descending
    if len(order) > max_candidates:
        image_ids = image_ids[order]
        ranks = torch.arange(len(order), device=scores.device) - _first_rows(image_ids, B)[image_ids]
        order = order[ranks < max_candidates]
    flat_ids = flat_ids[order]
    return _Candidates(
        image_ids=flat_ids // (A * K),
        anchor_ids=flat_ids // K % A,
        class_ids=flat_ids % K,
        scores=candidate_scores[order],
    )


def _decode_candidates(distance_logits: Sequence[Tensor], candidates: _Candidates) -> Tensor:
    """Boxes of the candidates only, (M, 4) float32 in pixels of the network input."""
    boxes_xyxy = candidates.scores.new_empty((len(candidates.scores), 4))
    first_anchor = 0
    for logits, stride in zip(distance_logits, STRIDES, strict=True):
        height, width = logits.shape[-2:]
        cells = candidates.anchor_ids - first_anchor
        rows = ((cells >= 0) & (cells < height * width)).nonzero().squeeze(1)  # m
        y, x = cells[rows] // width, cells[rows] % width
        points_xy = torch.stack((x, y), dim=-1).float() * stride  # m, 2
        cell_logits = logits[candidates.image_ids[rows], :, y, x]  # m, 4 * (R + 1)
        boxes_xyxy[rows] = boxes_from_distances(cell_logits, points_xy, stride)
        first_anchor += height * width
    return boxes_xyxy


def _keep_best(
    candidates: _Candidates, boxes_xyxy: Tensor, options: Sequence[DetectionOptions], class_count: int
) -> Selection:
    """NMS inside each image and class, then the best `max_detections` of each image."""
    image_ids, class_ids, scores = (
        column.cpu() for column in (candidates.image_ids, candidates.class_ids, candidates.scores)
    )
    boxes_xyxy = boxes_xyxy.cpu()
    agnostic = torch.tensor([option.class_agnostic for option in options], dtype=torch.bool)
    iou_thresholds = torch.tensor([option.iou_threshold for option in options], dtype=torch.float32)
    limits = torch.tensor([option.max_detections for option in options], dtype=torch.int64)

    kept = nms_per_group(
        boxes_xyxy,
        image_ids * class_count + class_ids.masked_fill(agnostic[image_ids], 0),
        iou_thresholds.repeat_interleave(class_count),
    )
    # Half-precision logits can overflow. A box that is not finite suppresses nothing, so it may go after NMS.
    kept &= boxes_xyxy.isfinite().all(dim=-1)
    kept_before = torch.cat((limits.new_zeros(1), kept.cumsum(0)))  # M + 1
    ranks = kept_before[:-1] - kept_before[_first_rows(image_ids, len(options))][image_ids]  # M
    kept &= ranks < limits[image_ids]
    return Selection(image_ids[kept], class_ids[kept], scores[kept], boxes_xyxy[kept])


def _first_rows(image_ids: Tensor, image_count: int) -> Tensor:
    """(B,) the row of each image's first entry in ascending `image_ids`."""
    return torch.searchsorted(image_ids, torch.arange(image_count, device=image_ids.device))


def _per_image(
    selection: Selection, image_sizes_hw: Sequence[tuple[int, int]], input_size_hw: tuple[int, int]
) -> list[Detections]:
    """The detections of each image, boxes in pixels of the original images."""
    image_ids, class_ids, scores, boxes_xyxy = (column.numpy() for column in selection)
    boxes_xyxy = boxes_xyxy * scale_factors_xyxy(image_sizes_hw, input_size_hw)[image_ids]
    bounds = np.searchsorted(image_ids, np.arange(len(image_sizes_hw) + 1))
    return [
        Detections(
            boxes_xyxy=boxes_xyxy[first:end].copy(),
            scores=scores[first:end].copy(),
            class_ids=class_ids[first:end].copy(),
            image_size_hw=image_size_hw,
        )
        for first, end, image_size_hw in zip(bounds[:-1], bounds[1:], image_sizes_hw, strict=True)
    ]
