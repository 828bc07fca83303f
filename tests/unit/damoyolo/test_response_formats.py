"""The formats that other projects read: their form, and the boxes and scores of the JSON."""

import json

import numpy as np
import pytest

from damoyolo.coco_categories import COCO_CLASS_NAMES
from damoyolo.response import CONTENT_TYPES, SINGLE_IMAGE_FORMATS, format_json, format_json_predictions
from damoyolo.response_formats import format_answer
from doubles.detections import make_detections

CLASS_NAMES = ("cell", 'a "quoted", name', "Zelle größer 細胞")
NOTHING = make_detections([], image_size_hw=(7, 9))
TWO = make_detections([[1.25, 2.5, 30, 40], [-3, 6, 7.004, 300]], [2, 0], [0.75, 1 / 3])


def body(output_format, *batch, batched=False, image_id=0, class_names=CLASS_NAMES):
    encoded = format_answer(batch, class_names, output_format, batched=batched, image_id=image_id)
    assert encoded.isascii()
    assert b": " not in encoded  # compact
    return encoded.decode()


def answer(output_format, *batch, **options):
    return json.loads(body(output_format, *batch, **options), parse_constant=pytest.fail)


def crowd():
    """Boxes with any number of decimals, some beyond the edges; and the same as the JSON has them."""
    random = np.random.default_rng(0)
    low = random.random((200, 2)) * (210, 130) - 5
    boxes = np.concatenate([low, low + 40 * random.random((200, 2))], axis=1)
    scores = np.sort(random.random(200))[::-1]
    detections = make_detections(boxes, random.integers(0, 3, 200), scores)
    return detections, json.loads(format_json(detections, CLASS_NAMES))["detections"]


def test_json_is_what_it_was():
    assert body("json", TWO).encode() == format_json(TWO, CLASS_NAMES)
    assert body("json", TWO, NOTHING, batched=True).encode() == format_json_predictions(
        [TWO, NOTHING], CLASS_NAMES
    )


def test_coco_is_a_list_of_results():
    assert answer("coco", TWO, image_id=42) == [
        {"image_id": 42, "category_id": 3, "bbox": [1.25, 2.5, 28.75, 37.5], "score": 0.75},
        {"image_id": 42, "category_id": 1, "bbox": [0, 6, 7, 114], "score": 0.333333},
    ]
    assert answer("coco", NOTHING) == []


@pytest.mark.parametrize("batched", [False, True])
def test_coco_results_of_several_images_are_one_list_with_the_next_image_ids(batched):
    batch = (TWO, NOTHING, TWO)
    assert answer("coco", *batch, batched=batched, image_id=7) == (
        answer("coco", TWO, image_id=7) + answer("coco", TWO, image_id=9)
    )


def test_coco_results_of_a_network_for_coco_have_the_category_ids_of_coco():
    detections = make_detections([[1, 2, 3, 4]], [COCO_CLASS_NAMES.index("toothbrush")])
    (entry,) = answer("coco", detections, class_names=COCO_CLASS_NAMES)
    assert entry["category_id"] == 90


def test_arrays_hold_a_list_for_each_property():
    assert answer("arrays", TWO) == {
        "width": 200,
        "height": 120,
        "boxes": [[1.25, 2.5, 30, 40], [0, 6, 7, 120]],
        "scores": [0.75, 0.333333],
        "class_ids": [2, 0],
        "labels": ["Zelle größer 細胞", "cell"],
    }
    empty = {"boxes": [], "scores": [], "class_ids": [], "labels": []}
    assert answer("arrays", NOTHING) == {"width": 9, "height": 7, **empty}


def test_supervision_is_the_answer_of_roboflows_inference():
    first, second = answer("supervision", TWO)["predictions"]
    assert first == {
        "x": 15.625,
        "y": 21.25,
        "width": 28.75,
        "height": 37.5,
        "confidence": 0.75,
        "class": "Zelle größer 細胞",
        "class_id": 2,
    }
    assert (second["x"], second["y"]) == (3.5, 63)
    assert answer("supervision", NOTHING) == {"image": {"width": 9, "height": 7}, "predictions": []}


@pytest.mark.parametrize("output_format", ["arrays", "supervision"])
def test_several_images_are_predictions_each_as_it_is_alone(output_format):
    expected = {"predictions": [answer(output_format, TWO), answer(output_format, NOTHING)]}
    assert answer(output_format, TWO, NOTHING, batched=True) == expected


def test_yolo_is_a_line_for_each_detection_in_shares_of_the_image():
    assert body("yolo", TWO) == (
        "2 0.078125 0.177083 0.143750 0.312500 0.750000\n0 0.017500 0.525000 0.035000 0.950000 0.333333\n"
    )
    assert body("yolo", NOTHING) == ""


def boxes_of_coco(found):
    return [[x, y, x + width, y + height] for x, y, width, height in (each["bbox"] for each in found)]


def boxes_of_supervision(found):
    x, y, width, height = (
        np.array([each[name] for each in found["predictions"]]) for name in ("x", "y", "width", "height")
    )
    return np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)


def test_every_format_has_exactly_the_boxes_and_scores_of_the_json():
    detections, found = crowd()
    boxes = [each["bbox"] for each in found]
    scores = [each["score"] for each in found]
    coco, arrays = answer("coco", detections), answer("arrays", detections)
    supervision = answer("supervision", detections)
    assert arrays["boxes"] == boxes
    assert arrays["scores"] == scores == [each["score"] for each in coco]
    assert scores == [each["confidence"] for each in supervision["predictions"]]
    # Decimals are exact to within the rounding of float64: 2**-53 of 240, a few times.
    np.testing.assert_allclose(boxes_of_coco(coco), boxes, rtol=0, atol=1e-12)
    np.testing.assert_allclose(boxes_of_supervision(supervision), boxes, rtol=0, atol=1e-12)
    yolo = np.array([line.split() for line in body("yolo", detections).splitlines()], dtype=float)
    sides = np.array([200, 120])
    low, high = (yolo[:, 1:3] - yolo[:, 3:5] / 2) * sides, (yolo[:, 1:3] + yolo[:, 3:5] / 2) * sides
    # Centre and half the size are rounded to 6 decimals of the image's side.
    np.testing.assert_allclose(np.concatenate([low, high], axis=1), boxes, rtol=0, atol=0.751e-6 * 200)
    assert yolo[:, 5].tolist() == scores


@pytest.mark.parametrize("output_format", [name for name in CONTENT_TYPES if name not in ("jpeg", "png")])
def test_numbers_that_are_not_finite_become_numbers(output_format):
    nan, infinity = float("nan"), float("inf")
    detections = make_detections([[nan, -infinity, infinity, 5]], scores=[nan])
    text = body(output_format, detections)
    assert "nan" not in text.lower()
    assert "inf" not in text.lower()
    if output_format not in SINGLE_IMAGE_FORMATS:
        json.loads(text, parse_constant=pytest.fail)
