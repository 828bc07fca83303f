"""Box arithmetic against float64."""

import numpy as np
import pytest
import torch

from damoyolo.boxes import anchor_points, boxes_from_distances, decode_predictions
from damoyolo.structures import RawPredictions

LEVEL_SIZES_HW = ((12, 8), (6, 4), (3, 2))  # of an input of 96 x 64 pixels
STRIDES = (8, 16, 32)


def random_predictions(*, batch_size=2, class_count=5, max_bin=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return RawPredictions(
        tuple(torch.randn(batch_size, class_count, h, w, generator=generator) * 2 for h, w in LEVEL_SIZES_HW),
        tuple(
            torch.randn(batch_size, 4 * (max_bin + 1), h, w, generator=generator) * 2
            for h, w in LEVEL_SIZES_HW
        ),
    )


def decode_in_float64(raw):
    """Cell by cell, as the paper says it."""
    B, K = raw.class_logits[0].shape[:2]
    scores, boxes = [], []
    for class_level, distance_level, stride in zip(
        raw.class_logits, raw.distance_logits, STRIDES, strict=True
    ):
        classes, distances = class_level.double().numpy(), distance_level.double().numpy()
        height, width = classes.shape[-2:]
        for row in range(height):
            for column in range(width):
                scores.append(1 / (1 + np.exp(-classes[:, :, row, column])))
                bins = np.exp(distances[:, :, row, column]).reshape(B, 4, -1)
                expected = (bins / bins.sum(-1, keepdims=True)) @ np.arange(bins.shape[-1]) * stride
                point = np.array([column * stride, row * stride])
                boxes.append(np.concatenate((point - expected[:, :2], point + expected[:, 2:]), axis=1))
    return np.stack(scores, axis=1).reshape(B, -1, K), np.stack(boxes, axis=1)


def test_anchor_points_are_top_left_corners_level_by_level_and_row_by_row():
    points = anchor_points([(2, 3), (1, 2)], [8, 16], "cpu")
    assert points.dtype == torch.float32
    assert points.tolist() == [[0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8], [0, 0], [16, 0]]


def test_anchor_points_first_asked_for_in_inference_mode_still_serve_autograd():
    with torch.inference_mode():
        points = anchor_points([(7, 5)], [8], "cpu")
    assert not points.is_inference()
    assert anchor_points(((7, 5),), (8,), torch.device("cpu")) is points


@pytest.mark.parametrize("max_bin", [16, 7])
def test_decoding_agrees_with_float64(max_bin):
    raw = random_predictions(max_bin=max_bin)
    scores, boxes = decode_predictions(raw)
    wanted_scores, wanted_boxes = decode_in_float64(raw)
    assert scores.dtype == boxes.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), wanted_scores, rtol=0, atol=2e-7)
    np.testing.assert_allclose(boxes.numpy(), wanted_boxes, rtol=0, atol=2e-4)


def test_a_certain_distance_gives_a_box_to_the_pixel():
    logits = torch.full((4, 17), -torch.inf)
    for side, distance in enumerate((1, 2, 3, 16)):
        logits[side, distance] = 0
    box = boxes_from_distances(logits.flatten(), torch.tensor([40.0, 80.0]), stride=8)
    assert box.tolist() == [40 - 8, 80 - 16, 40 + 24, 80 + 128]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_decoded_in_float32(dtype):
    raw = random_predictions()
    half = RawPredictions(*(tuple(level.to(dtype) for level in levels) for levels in raw))
    widened = RawPredictions(*(tuple(level.float() for level in levels) for levels in half))
    for got, wanted in zip(decode_predictions(half), decode_predictions(widened), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted)


def test_autocast_changes_nothing():
    raw = random_predictions()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = decode_predictions(raw)
    for got, wanted in zip(under_autocast, decode_predictions(raw), strict=True):
        assert torch.equal(got, wanted)


def test_the_memory_format_changes_nothing():
    raw = random_predictions()
    channels_last = RawPredictions(
        *(tuple(level.contiguous(memory_format=torch.channels_last) for level in levels) for levels in raw)
    )
    for got, wanted in zip(decode_predictions(channels_last), decode_predictions(raw), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_an_empty_batch_decodes_to_empty_tensors():
    scores, boxes = decode_predictions(random_predictions(batch_size=0, class_count=3))
    assert scores.shape == (0, 126, 3)
    assert boxes.shape == (0, 126, 4)
