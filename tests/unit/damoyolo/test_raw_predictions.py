"""Raw predictions as they are served, and batches of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from damoyolo.detector import Detector
from damoyolo.structures import RawPredictions


class FakePipeline:
    """Takes four images; predicts an image's first byte, which the next call overwrites."""

    max_batch_size = 4

    def __init__(self) -> None:
        self.result = torch.zeros(4)

    def network_call(self, pixels: Tensor) -> Any:
        def replay() -> RawPredictions:
            self.result[: len(pixels)] = pixels[:, 0, 0, 0].float()
            return RawPredictions((self.result[: len(pixels)],), (self.result[: len(pixels)],))

        return replay


def images(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)


def raw_predictions(detector: Any, pixels: Tensor) -> RawPredictions:
    return Detector.raw_predictions(detector, pixels)


def test_later_calls_leave_raw_predictions_alone() -> None:
    detector: Any = SimpleNamespace(pipeline=FakePipeline())
    first = raw_predictions(detector, images(7, 8, 9))
    second = raw_predictions(detector, images(1))
    assert [first.class_logits[0].tolist(), first.distance_logits[0].tolist()] == [[7, 8, 9]] * 2
    assert second.class_logits[0].tolist() == [1]


def test_more_images_than_the_pipeline_takes_are_cut_up() -> None:
    detector: Any = SimpleNamespace(pipeline=FakePipeline())
    found = raw_predictions(detector, images(1, 2, 3, 4, 5))
    assert found.class_logits[0].tolist() == [1, 2, 3, 4, 5]


def test_batches_are_joined_in_their_order() -> None:
    parts = [RawPredictions((torch.full((2, 1), k),), (torch.full((2, 3), -k),)) for k in (1.0, 2.0)]
    joined = RawPredictions.joined(parts)
    assert joined.class_logits[0].flatten().tolist() == [1, 1, 2, 2]
    assert joined.distance_logits[0].shape == (4, 3)
    assert joined.distance_logits[0][:, 0].tolist() == [-1, -1, -2, -2]
