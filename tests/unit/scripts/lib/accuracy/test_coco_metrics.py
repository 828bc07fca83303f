"""Average precision in cases that can be calculated by hand."""

from pathlib import Path

import pytest
from PIL import Image

from lib.accuracy.coco_metrics import MetricsError, compute_metrics, plot_precision_recall
from lib.accuracy.datasets import AnnotatedImage, AnnotatedObject, DetectionDataset

BOXES = [(0, 0, 40, 40), (100, 0, 160, 50), (0, 100, 30, 180), (200, 200, 300, 260)]


def dataset_of(*images):
    annotated = [AnnotatedImage(n, Path(f"{n}.jpg"), tuple(each)) for n, each in enumerate(images, start=1)]
    return DetectionDataset("cells", {1: "RBC", 2: "WBC"}, tuple(annotated), 0)


def predicted(box, score=0.9, category_id=1, image_id=1):
    x1, y1, x2, y2 = box
    box_xywh = [x1, y1, x2 - x1, y2 - y1]
    return {"image_id": image_id, "category_id": category_id, "bbox": box_xywh, "score": score}


def cells(category_id=1, ignored=False):
    return [AnnotatedObject(category_id, box, ignored) for box in BOXES]


# With m of n objects found and nothing false, precision is 1 up to recall m / n and 0 beyond; of the 101
# recall levels, floor(100 * m / n) + 1 lie up to there.


def test_perfect_detections_have_an_average_precision_of_one():
    metrics = compute_metrics(dataset_of(cells()), [predicted(box) for box in BOXES])
    assert metrics.overall == pytest.approx((1, 1, 1))
    assert metrics.per_class == {"RBC": pytest.approx((1, 1, 1))}


def test_a_missed_object_of_four_leaves_the_recall_levels_up_to_three_quarters():
    metrics = compute_metrics(dataset_of(cells()), [predicted(box) for box in BOXES[:3]])
    assert metrics.overall == pytest.approx((76 / 101,) * 3)


def test_the_right_box_with_the_wrong_class_is_a_miss_and_a_false_detection():
    dataset = dataset_of([AnnotatedObject(1, BOXES[0]), AnnotatedObject(2, BOXES[1])])
    metrics = compute_metrics(dataset, [predicted(BOXES[0]), predicted(BOXES[1], category_id=1)])
    assert metrics.per_class["RBC"].ap == pytest.approx(1)
    assert metrics.per_class["WBC"].ap == 0
    assert metrics.overall.ap == pytest.approx(0.5)


def test_the_right_box_in_the_wrong_image_is_no_hit():
    dataset = dataset_of([AnnotatedObject(1, BOXES[0])], [])
    assert compute_metrics(dataset, [predicted(BOXES[0], image_id=2)]).overall.ap == 0


def test_a_loose_box_counts_up_to_its_overlap():
    # 100 x 62 of 100 x 100: an IoU of 0.62 is enough at 0.50, 0.55 and 0.60, and at none of the other seven.
    dataset = dataset_of([AnnotatedObject(1, (0, 0, 100, 100))])
    metrics = compute_metrics(dataset, [predicted((0, 0, 100, 62))])
    assert metrics.overall == pytest.approx((0.3, 1, 0))


def test_ignored_objects_neither_reward_nor_punish():
    objects = [AnnotatedObject(1, BOXES[0]), AnnotatedObject(1, BOXES[1], ignored=True)]
    missed = compute_metrics(dataset_of(objects), [predicted(BOXES[0], 0.5)])
    found = compute_metrics(dataset_of(objects), [predicted(BOXES[0], 0.5), predicted(BOXES[1], 0.9)])
    assert missed.overall == found.overall == pytest.approx((1, 1, 1))


def test_a_class_without_objects_does_not_enter_the_mean():
    predictions = [predicted(box) for box in BOXES] + [predicted(BOXES[0], category_id=2)]
    metrics = compute_metrics(dataset_of(cells()), predictions)
    assert list(metrics.per_class) == ["RBC"]
    assert metrics.overall.ap == pytest.approx(1)


def test_only_the_best_hundred_boxes_of_an_image_count():
    noise = [predicted((500 + n, 500, 520 + n, 520), 0.9) for n in range(100)]
    dataset = dataset_of([AnnotatedObject(1, BOXES[0])])
    assert compute_metrics(dataset, [*noise, predicted(BOXES[0], 0.5)]).overall.ap == 0
    assert compute_metrics(dataset, [*noise[1:], predicted(BOXES[0], 0.5)]).overall.ap == pytest.approx(0.01)


def test_predictions_are_left_as_they_are_and_nothing_is_printed(capfd):
    predictions = [predicted(BOXES[0])]
    compute_metrics(dataset_of(cells()), predictions)
    assert predictions == [predicted(BOXES[0])]
    assert capfd.readouterr() == ("", "")


def test_nothing_to_measure_is_reported_in_words():
    with pytest.raises(MetricsError, match="no images"):
        compute_metrics(dataset_of(), [predicted(BOXES[0])])
    with pytest.raises(MetricsError, match="no objects"):
        compute_metrics(dataset_of([], cells(ignored=True)), [predicted(BOXES[0])])
    with pytest.raises(MetricsError, match="nothing was detected in the 1 images"):
        compute_metrics(dataset_of(cells()), [])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib and what it imports
def test_the_plot_is_an_image(tmp_path):
    metrics = compute_metrics(dataset_of(cells()), [predicted(box) for box in BOXES[:3]])
    path = tmp_path / "plot.png"
    plot_precision_recall(metrics, "cells", path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("L").getcolors() or []) > 10
