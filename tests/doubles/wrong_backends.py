"""Ways in which a backend can be wrong without an error; each changes correct predictions of a batch."""

from collections.abc import Callable

import torch

from damoyolo.structures import RawPredictions

Wrong = Callable[[RawPredictions], RawPredictions]


def _with_classes(raw, change):
    return RawPredictions(tuple(map(change, raw.class_logits)), raw.distance_logits)


def _with_distances(raw, change):
    return RawPredictions(raw.class_logits, tuple(map(change, raw.distance_logits)))


def _without_class(index):
    def change(logits):
        changed = logits.clone()
        changed[:, index] = -9.0  # a score of 0.0001
        return changed

    return lambda raw: _with_classes(raw, change)


def _first_nan(logits):
    changed = logits.clone()
    changed[-1, 0, 0, 0] = torch.nan
    return changed


def _in_batches_only(raw):
    """Wrong in one profile: the last image of a batch of two or more gets the boxes of the first."""
    if len(raw.class_logits[0]) == 1:
        return raw
    return _with_distances(raw, lambda logits: torch.cat((logits[:-1], logits[:1])))


WRONG_BACKENDS = {
    "sides swapped": lambda raw: _with_distances(raw, lambda logits: logits.roll(logits.shape[1] // 4, 1)),
    "boxes shifted by a bin": lambda raw: _with_distances(raw, lambda logits: logits.roll(1, 1)),
    "boxes shifted by a cell": lambda raw: _with_distances(raw, lambda logits: logits.roll(1, 3)),
    "a common class lost": _without_class(1),
    "a rare class lost": _without_class(0),
    "classes swapped": lambda raw: _with_classes(raw, lambda logits: logits.flip(1)),
    "outputs swapped": lambda raw: RawPredictions(raw.distance_logits, raw.class_logits),
    "levels swapped": lambda raw: RawPredictions(raw.class_logits[::-1], raw.distance_logits[::-1]),
    "one value not finite": lambda raw: _with_classes(raw, _first_nan),
    "logits too low": lambda raw: _with_classes(raw, lambda logits: logits * 0.9),
    "images forgotten": lambda raw: RawPredictions(
        *(tuple(torch.zeros_like(level) for level in side) for side in raw)
    ),
    "wrong in batches alone": _in_batches_only,
}
