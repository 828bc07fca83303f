"""Raw predictions to detections: threshold, decode what survives, NMS, scale back; a whole batch at once.

The images of a batch may carry different options. On CUDA the host waits for the device to learn the
number of candidates and which of them lie on each level, the group sizes, what each round of NMS leaves, the
number of detections, and for the one copy of the result; for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from damoyolo.boxes import STRIDES, boxes_from_distances, class_scores, pairwise_iou
from damoyolo.structures import DetectionOptions, Detections, RawPredictions

# Boxes of a group that settle among themselves in one round of NMS. Measured on 2 CPU cores, 24 groups of
# 1000 boxes and 640 groups of 40: 16 to 64 within a factor 1.8, 32 the best of both; 256 takes twice as long.
BLOCK_SIZE = 32
# Pairs of boxes compared at once, a bound on memory: 16 MiB a float32 term, about six terms alive.
PAIR_BUDGET = 2**22


class Selection(NamedTuple):
    """Boxes of a batch on the device: images ascending, in an image scores descending.

    Equal scores are in the order of anchor * K + class.
    """

    image_ids: Tensor  # (N,) int64
    class_ids: Tensor  # (N,) int64
    scores: Tensor  # (N,) float32
    boxes_xyxy: Tensor  # (N, 4) float32, pixels of the network input


class _Candidates(NamedTuple):
    """(Anchor, class) pairs above the threshold, in the order of `Selection`."""

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
        options: one an image.
        image_sizes_hw: original height and width of each image in pixels.
        input_size_hw: height and width of the network input in pixels.
        max_candidates: the best so many (anchor, class) pairs of an image enter NMS.

    Returns:
        B detections; boxes are scaled to the original image and not clipped to it. Boxes that are not
        finite are left out.

    Raises:
        ValueError: options or image sizes are not one an image.
    """
    scores = class_scores(raw.class_logits)  # B, A, K
    if len(image_sizes_hw) != len(scores):
        raise ValueError(f"{len(image_sizes_hw)} image sizes for {len(scores)} images; one each is needed")
    candidates = _find_candidates(scores, options, max_candidates)
    boxes_xyxy = _decode_candidates(raw.distance_logits, candidates)
    selection = _keep_best(candidates, boxes_xyxy, options, class_count=scores.shape[-1])
    return _to_host(selection, image_sizes_hw, input_size_hw)


def select(
    scores: Tensor, boxes_xyxy: Tensor, options: Sequence[DetectionOptions], max_candidates: int
) -> Selection:
    """The same choice from predictions that are decoded already.

    Args:
        scores: (B, A, K) float32 in 0..1.
        boxes_xyxy: (B, A, 4) float32 in pixels of the network input.
        options: one an image.
        max_candidates: the best so many (anchor, class) pairs of an image enter NMS.

    Raises:
        ValueError: options are not one an image.
    """
    candidates = _find_candidates(scores, options, max_candidates)
    candidate_boxes = boxes_xyxy[candidates.image_ids, candidates.anchor_ids]  # M, 4
    return _keep_best(candidates, candidate_boxes, options, class_count=scores.shape[-1])


def batched_nms_exact(
    boxes_xyxy: Tensor,
    group_ids: Tensor,
    scores: Tensor,
    iou_thresholds_per_group: Tensor,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Greedy NMS inside each group, as torchvision.ops.nms called for every group by itself.

    Boxes keep their coordinates: the usual trick of moving each group to a place of its own rounds float32
    coordinates and with them the IoU. A box goes if its IoU with a better kept one of its group is strictly
    above the group's threshold, compared in float32. Equal scores: the earlier box is the better one.

    Args:
        boxes_xyxy: (M, 4) float32.
        group_ids: (M,) int64 in 0..G-1, in any order.
        scores: (M,) float32 without NaN.
        iou_thresholds_per_group: (G,) float32.
        block_size: boxes of a group compared with each other at once; no influence on the result.

    Returns:
        (M,) bool, which boxes stay.
    """
    device = boxes_xyxy.device
    M, G = len(boxes_xyxy), len(iou_thresholds_per_group)
    order = _order_by_group_and_score(group_ids, scores)
    starts = torch.searchsorted(group_ids[order], torch.arange(G + 1, device=device))  # G + 1
    sizes = np.diff(starts.cpu().numpy())

    # Row M pads the groups of a chunk to one length: NaN overlaps nothing.
    sorted_boxes = torch.cat((boxes_xyxy[order], boxes_xyxy.new_full((1, 4), torch.nan)))  # M + 1, 4
    kept = torch.ones(M + 1, dtype=torch.bool, device=device)
    for chunk in _chunks_of_similar_size(sizes, block_size):
        groups = torch.from_numpy(chunk).to(device)  # g
        rows = starts[groups, None] + torch.arange(int(sizes[chunk].max()), device=device)  # g, n
        rows = torch.where(rows < starts[groups + 1, None], rows, M)
        _greedy_nms(sorted_boxes, rows, iou_thresholds_per_group[groups], block_size, kept)
    return torch.empty_like(kept[:M]).index_copy_(0, order, kept[:M])


def _order_by_group_and_score(group_ids: Tensor, scores: Tensor) -> Tensor:
    """(M,) permutation: groups ascending, scores descending, equal ones as they came."""
    order = scores.sort(descending=True, stable=True).indices
    return order[group_ids[order].sort(stable=True).indices]


def _chunks_of_similar_size(sizes: NDArray[np.int64], block_size: int) -> Iterator[NDArray[np.int64]]:
    """Ids of groups padded to one length together: less than twice their own, within `PAIR_BUDGET`.

    Groups of one box or none need no work and are left out.
    """
    doublings = np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.int64)
    for doubling in range(1, int(doublings.max(initial=0)) + 1):
        (ids,) = np.nonzero(doublings == doubling)
        pairs_per_group = 2**doubling * min(2**doubling, block_size)
        step = max(1, PAIR_BUDGET // pairs_per_group)
        for first in range(0, len(ids), step):
            yield ids[first : first + step]


def _greedy_nms(
    boxes_xyxy: Tensor, rows: Tensor, iou_thresholds: Tensor, block_size: int, kept: Tensor
) -> None:
    """Greedy NMS of g groups side by side; writes into `kept`, (M + 1,) bool, which rows stay.

    The best boxes that wait, a block, settle among themselves; those that stay suppress the boxes behind
    them, and what is left of these closes ranks for the next round.

    Args:
        boxes_xyxy: (M + 1, 4); the last row is padding.
        rows: (g, n) rows of `boxes_xyxy`, the best of a group first, then padding.
        iou_thresholds: (g,).
    """
    thresholds = iou_thresholds[:, None, None]
    padding_row = len(boxes_xyxy) - 1
    while rows.shape[1]:
        block_rows, rows = rows[:, :block_size], rows[:, block_size:]  # g, b and g, rest
        block = boxes_xyxy[block_rows]  # g, b, 4
        stays = _resolve_suppression((pairwise_iou(block, block) > thresholds).triu_(diagonal=1))  # g, b
        kept[block_rows] = stays
        if rows.shape[1]:
            better = boxes_xyxy[_compact_rows(block_rows, stays, padding_row)]  # g, s, 4
            waits = ~(pairwise_iou(better, boxes_xyxy[rows]) > thresholds).any(dim=1)  # g, rest
            kept[rows] = waits
            rows = _compact_rows(rows, waits, padding_row)  # g, w


def _resolve_suppression(suppresses: Tensor) -> Tensor:
    """The greedy outcome as the fixed point of "a box stays if no better one that stays suppresses it".

    After t rounds the first t boxes are final, because each depends on better ones only; the rounds needed
    are the longest chain of boxes that decide over each other, in practice a few.

    Args:
        suppresses: (g, b, b) bool, strictly upper triangular: the row suppresses the column.

    Returns:
        (g, b) bool, which boxes stay.
    """
    stays = ~suppresses.any(dim=1)
    while True:
        settled = ~(suppresses & stays[:, :, None]).any(dim=1)
        if torch.equal(settled, stays):
            return stays
        stays = settled


def _compact_rows(rows: Tensor, chosen: Tensor, padding_row: int) -> Tensor:
    """The chosen rows of each group in their order, (g, n) to (g, most chosen in a group), then padding."""
    chosen = chosen & (rows != padding_row)
    places = chosen.cumsum(dim=1)  # g, n; from 1
    most = int(places[:, -1].max())
    places = torch.where(chosen, places - 1, most)
    return rows.new_full((len(rows), most + 1), padding_row).scatter_(1, places, rows)[:, :most]


def _find_candidates(scores: Tensor, options: Sequence[DetectionOptions], max_candidates: int) -> _Candidates:
    """Pairs strictly above their image's threshold, of its classes; the best `max_candidates` an image."""
    B, A, K = scores.shape
    if len(options) != B:
        raise ValueError(f"{len(options)} options for {B} images; one each is needed")
    thresholds = np.full((B, 1, K), np.inf, dtype=np.float32)  # above every score: class not asked for
    for row, option in zip(thresholds[:, 0], options, strict=True):
        row[slice(None) if option.class_ids is None else list(option.class_ids)] = option.score_threshold

    above = scores > torch.from_numpy(thresholds).to(scores.device)  # B, A, K; NaN is not above
    flat_ids = above.flatten().nonzero().squeeze(1)  # M
    candidate_scores = scores.flatten()[flat_ids]
    image_ids = flat_ids // (A * K)
    order = _order_by_group_and_score(image_ids, candidate_scores)
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
    """Boxes of the candidates alone, (M, 4) float32 in pixels of the network input."""
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
    device = boxes_xyxy.device
    image_ids = candidates.image_ids
    agnostic = _per_image([option.class_agnostic for option in options], torch.bool, device)
    iou_thresholds = _per_image([option.iou_threshold for option in options], torch.float32, device)
    limits = _per_image([option.max_detections for option in options], torch.int64, device)

    own_class = candidates.class_ids.masked_fill(agnostic[image_ids], 0)
    kept = batched_nms_exact(
        boxes_xyxy,
        image_ids * class_count + own_class,
        candidates.scores,
        iou_thresholds.repeat_interleave(class_count),
    )
    # Half-precision logits can overflow. Such a box overlaps nothing, so that it may go as late as here.
    kept &= boxes_xyxy.isfinite().all(dim=-1)
    kept_before = torch.cat((limits.new_zeros(1), kept.cumsum(0)))  # M + 1
    ranks = kept_before[:-1] - kept_before[_first_rows(image_ids, len(options))][image_ids]  # M
    kept &= ranks < limits[image_ids]
    rows = kept.nonzero().squeeze(1)  # N
    return Selection(image_ids[rows], candidates.class_ids[rows], candidates.scores[rows], boxes_xyxy[rows])


def _per_image(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(device)


def _first_rows(image_ids: Tensor, image_count: int) -> Tensor:
    """(B,) the row of each image's first entry in ascending `image_ids`."""
    return torch.searchsorted(image_ids, torch.arange(image_count, device=image_ids.device))


def _to_host(
    selection: Selection, image_sizes_hw: Sequence[tuple[int, int]], input_size_hw: tuple[int, int]
) -> list[Detections]:
    """Boxes in pixels of the original images, in one copy; ids are exact in float32 up to 2**24."""
    input_height, input_width = input_size_hw
    scales = [(width / input_width, height / input_height) * 2 for height, width in image_sizes_hw]  # B, 4
    scales_xyxy = _per_image(scales, torch.float32, selection.scores.device).reshape(-1, 4)
    columns = (
        selection.boxes_xyxy * scales_xyxy[selection.image_ids],
        selection.scores[:, None],
        selection.class_ids[:, None].float(),
        selection.image_ids[:, None].float(),
    )
    packed: NDArray[np.float32] = torch.cat(columns, dim=1).cpu().numpy()  # N, 7
    bounds = np.searchsorted(packed[:, 6], np.arange(len(image_sizes_hw) + 1))
    return [
        Detections(
            boxes_xyxy=packed[first:end, :4].copy(),
            scores=packed[first:end, 4].copy(),
            class_ids=packed[first:end, 5].astype(np.int64),
            image_size_hw=image_size_hw,
        )
        for first, end, image_size_hw in zip(bounds[:-1], bounds[1:], image_sizes_hw, strict=True)
    ]
