"""The values that pass from stage to stage."""

import torch

from damoyolo.structures import RawPredictions


def test_batches_of_raw_predictions_are_joined_in_their_order():
    parts = [RawPredictions((torch.full((2, 1), k),), (torch.full((2, 3), -k),)) for k in (1.0, 2.0)]
    joined = RawPredictions.joined(parts)
    assert joined.class_logits[0].flatten().tolist() == [1, 1, 2, 2]
    assert joined.distance_logits[0].shape == (4, 3)
    assert joined.distance_logits[0][:, 0].tolist() == [-1, -1, -2, -2]
