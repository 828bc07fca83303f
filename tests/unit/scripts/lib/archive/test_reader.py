from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.archive.reader import served_network

from damoyolo.errors import ConfigError
from damoyolo.structures import RawPredictions


class FakePipeline:
    """A recording of four pictures, whose prediction is a picture's first byte."""

    largest_batch = 4

    def __init__(self) -> None:
        self.pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        self.result = torch.zeros(4)

    def network_call(self, _pictures: int) -> Any:
        def replay() -> RawPredictions:
            self.result.copy_(self.pixels[:, 0, 0, 0])
            return RawPredictions((self.result,), (self.result,))

        return replay


def pictures(*grey_levels: int) -> Tensor:
    return torch.tensor(grey_levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)


def test_what_is_recorded_is_what_serves() -> None:
    detector: Any = SimpleNamespace(pipeline=FakePipeline(), engine=None)
    predict = served_network(detector)
    first = predict(pictures(7, 8, 9))
    second = predict(pictures(1))
    # The second call has written over what the first one found.
    assert [first.class_logits[0].tolist(), first.distance_logits[0].tolist()] == [[7, 8, 9]] * 2
    assert second.class_logits[0].tolist() == [1]


def test_more_than_a_recording_holds_is_refused() -> None:
    detector: Any = SimpleNamespace(pipeline=FakePipeline(), engine=None)
    with pytest.raises(ConfigError, match="up to"):
        served_network(detector)(pictures(1, 2, 3, 4, 5))


def test_without_a_recording_the_engine_serves() -> None:
    detector: Any = SimpleNamespace(pipeline=None, engine=object())
    assert served_network(detector) is detector.engine


def test_batches_are_joined_in_their_order() -> None:
    parts = [RawPredictions((torch.full((2, 1), k),), (torch.full((2, 3), -k),)) for k in (1.0, 2.0)]
    joined = RawPredictions.joined(parts)
    assert joined.class_logits[0].flatten().tolist() == [1, 1, 2, 2]
    assert joined.distance_logits[0].shape == (4, 3)
    assert joined.distance_logits[0][:, 0].tolist() == [-1, -1, -2, -2]
