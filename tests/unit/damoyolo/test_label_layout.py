"""Labels that hide each other only where every position of a label is taken."""

import numpy as np
import pytest

from damoyolo.label_layout import label_positions, place_labels

IMAGE_WH = (640, 480)


def crowd(count, seed, largest=80, image_wh=IMAGE_WH):
    """Boxes (N, 4) anywhere in the image and the sizes of their labels (N, 2)."""
    random = np.random.default_rng(seed)
    sides = 4 + random.random((count, 2)) * (largest - 4)
    corners = random.random((count, 2)) * (np.array(image_wh) - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    sizes = np.stack([random.integers(40, 80, count), random.integers(12, 16, count)], axis=1)
    return boxes, sizes


def bars(corners_xy, sizes):
    return np.concatenate([corners_xy, corners_xy + sizes], axis=1)


def shared_area(bar, others):
    """The area of `bar` that each of `others` (n, 4) shares."""
    width = np.minimum(bar[2], others[:, 2]) - np.maximum(bar[0], others[:, 0])
    height = np.minimum(bar[3], others[:, 3]) - np.maximum(bar[1], others[:, 1])
    return np.maximum(width, 0) * np.maximum(height, 0)


def hidden_share(labels):
    """The area that labels share, as a share of their area."""
    hidden = sum(shared_area(bar, labels[:index]).sum() for index, bar in enumerate(labels))
    return hidden / np.prod(labels[:, 2:] - labels[:, :2], axis=1).sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [2, 30, 150])
def test_a_label_hides_another_only_if_none_of_its_positions_is_free_and_then_the_least(count, seed):
    boxes, sizes = crowd(count, seed)
    placed = bars(place_labels(sizes, boxes, boxes, IMAGE_WH), sizes)
    positions = label_positions(sizes, boxes, IMAGE_WH)
    for index, bar in enumerate(placed):
        candidates = [bars(corner[None], sizes[index : index + 1])[0] for corner in positions[index]]
        assert bar.tolist() in [candidate.tolist() for candidate in candidates]
        least = min(shared_area(candidate, placed[:index]).sum() for candidate in candidates)
        assert shared_area(bar, placed[:index]).sum() == least


@pytest.mark.parametrize(("count", "most_left"), [(60, 0.1), (150, 0.2), (300, 0.4), (1000, 0.8)])
def test_much_less_is_hidden_than_with_all_labels_above_their_boxes(count, most_left):
    before = after = 0.0
    for seed in range(5):
        boxes, sizes = crowd(count, seed)
        before += hidden_share(bars(label_positions(sizes, boxes, IMAGE_WH)[:, 0], sizes))
        after += hidden_share(bars(place_labels(sizes, boxes, boxes, IMAGE_WH), sizes))
    assert before / 5 > 0.05
    assert after < most_left * before


@pytest.mark.parametrize("image_wh", [(640, 480), (64, 64), (90, 2000), (8000, 20), (80, 16)])
def test_every_label_lies_inside_the_image(image_wh):
    boxes, sizes = crowd(40, seed=2, largest=10, image_wh=image_wh)
    sizes = np.minimum(sizes, image_wh)
    placed = bars(place_labels(sizes, boxes, boxes, image_wh), sizes)
    assert (placed[:, :2] >= 0).all()
    assert (placed[:, 2:] <= image_wh).all()


def test_a_label_alone_stands_above_its_box():
    box = np.array([[100, 100, 200, 200]], np.float32)
    assert place_labels(np.array([[50, 12]]), box, box, IMAGE_WH).tolist() == [[100, 88]]


def test_a_label_stands_where_it_covers_no_other_box():
    boxes = np.array([[100, 100, 200, 200], [60, 40, 240, 98]], np.float32)  # the second lies above the first
    first = place_labels(np.array([[50, 12]] * 2), boxes, boxes, IMAGE_WH)[0]
    assert first.tolist() == [100, 200]


def test_boxes_without_a_label_are_not_covered_either():
    boxes = np.array([[100, 100, 200, 200], [60, 40, 240, 98]], np.float32)
    (first,) = place_labels(np.array([[50, 12]]), boxes[:1], boxes, IMAGE_WH)
    assert first.tolist() == [100, 200]


def test_no_labels_are_placed_for_no_boxes():
    boxes = np.empty((0, 4), np.float32)
    assert place_labels(np.empty((0, 2), np.int64), boxes, boxes, IMAGE_WH).shape == (0, 2)


def test_the_same_boxes_give_the_same_places():
    boxes, sizes = crowd(1000, seed=3)
    places = [place_labels(sizes, boxes, boxes, IMAGE_WH) for _ in range(2)]
    np.testing.assert_array_equal(*places)
