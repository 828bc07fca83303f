"""Place the labels of boxes in an image, so that they hide neither each other nor the boxes where avoidable.

The work is bounded: for each label, the same few positions against the labels placed before.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_GRID = 128  # cells along each side of the image in which the boxes are counted
# What each position of `label_positions` costs beside the number of boxes that it lies on: the more, the
# further it is from where readers look for a label. So a label above its box may lie on part of another one.
_POSITION_COSTS = np.array([0.0, 0.15, 0.3, 0.4, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.6, 0.6])


def place_labels(
    sizes_wh: Ints,
    own_boxes_xyxy: NDArray[np.float32],
    all_boxes_xyxy: NDArray[np.float32],
    image_size_wh: tuple[int, int],
) -> Ints:
    """The upper left corner of each label, (N, 2) x, y in whole pixels, all of it inside the image.

    Labels choose in their order, each among the positions of `label_positions`: the one that hides least of
    the labels before it; of several such, one that lies on few boxes and near the upper edge of its own.

    Args:
        sizes_wh: (N, 2) width and height of each label, no larger than the image.
        own_boxes_xyxy: (N, 4) the box of each label, inside the image.
        all_boxes_xyxy: (M, 4) all boxes in the image, those without a label included.
    """
    positions_xy = label_positions(sizes_wh, own_boxes_xyxy, image_size_wh)  # N,C,2
    candidates = np.concatenate([positions_xy, positions_xy + sizes_wh[:, None]], axis=2)  # N,C,4
    costs = _boxes_under(candidates, all_boxes_xyxy, image_size_wh) + _POSITION_COSTS  # N,C
    sides = np.ascontiguousarray(candidates.transpose(0, 2, 1)[..., None], dtype=np.float32)  # N,4,C,1
    placed = np.empty((4, len(sizes_wh)), dtype=np.float32)  # x1, y1, x2, y2 by label
    chosen = np.empty(len(sizes_wh), dtype=np.int64)
    for index in range(len(sizes_wh)):
        hidden = _shared_areas(sides[index], placed[:, :index])  # C
        chosen[index] = np.argmin(np.where(hidden == hidden.min(), costs[index], np.inf))
        placed[:, index] = candidates[index, chosen[index]]
    return positions_xy[np.arange(len(sizes_wh)), chosen]


def label_positions(sizes_wh: Ints, boxes_xyxy: NDArray[np.float32], image_size_wh: tuple[int, int]) -> Ints:
    """(N, 12, 2) the positions of each label that are considered, moved inside the image.

    Above the box, below it, in its corners and beside it, in line with one of its edges.
    """
    x1, y1, x2, y2 = np.rint(boxes_xyxy).astype(np.int64).T
    width, height = sizes_wh.T
    corners = [
        (x1, y1 - height),  # above
        (x2 - width, y1 - height),
        (x1, y2),  # below
        (x2 - width, y2),
        (x1, y1),  # inside
        (x2 - width, y1),
        (x1, y2 - height),
        (x2 - width, y2 - height),
        (x2, y1),  # beside
        (x1 - width, y1),
        (x2, y2 - height),
        (x1 - width, y2 - height),
    ]
    positions_xy = np.stack([np.stack(corner, axis=1) for corner in corners], axis=1)  # N,C,2
    inside: Ints = np.clip(positions_xy, 0, (np.array(image_size_wh) - sizes_wh)[:, None])
    return inside


def _shared_areas(sides: NDArray[np.float32], placed: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C,) the area of each candidate that the placed labels cover, overlaps of these counted again.

    sides: (4, C, 1) x1, y1, x2, y2. placed: (4, n).
    """
    shared_width = np.minimum(sides[2], placed[2]) - np.maximum(sides[0], placed[0])  # C,n
    shared_height = np.minimum(sides[3], placed[3]) - np.maximum(sides[1], placed[1])  # C,n
    np.maximum(shared_width, 0, out=shared_width)
    np.maximum(shared_height, 0, out=shared_height)
    areas: NDArray[np.float32] = np.einsum("cn,cn->c", shared_width, shared_height)
    return areas


def _boxes_under(
    candidates: Ints, boxes_xyxy: NDArray[np.float32], image_size_wh: tuple[int, int]
) -> NDArray[np.float64]:
    """(N, C) how many boxes a candidate lies on, on average over its area, to the precision of a grid.

    Two-dimensional prefix sums make it one look-up per corner, however many boxes there are.
    """
    scale = _GRID / np.array([*image_size_wh, *image_size_wh], dtype=np.float64)
    left, top, right, bottom = np.rint(boxes_xyxy * scale).astype(np.int64).T  # M
    counts = np.zeros((_GRID + 1, _GRID + 1))
    for rows, columns, change in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        np.add.at(counts, (rows, columns), change)
    counts = counts.cumsum(axis=0).cumsum(axis=1)  # boxes over each cell
    sums = np.zeros((_GRID + 2, _GRID + 2))
    sums[1:, 1:] = counts.cumsum(axis=0).cumsum(axis=1)
    x1, y1, x2, y2 = np.moveaxis(np.rint(candidates * scale).astype(np.int64), 2, 0)  # N,C
    x2, y2 = np.maximum(x2, x1 + 1), np.maximum(y2, y1 + 1)  # a cell at least
    total = sums[y2, x2] - sums[y1, x2] - sums[y2, x1] + sums[y1, x1]
    under: NDArray[np.float64] = total / ((x2 - x1) * (y2 - y1))
    return under
