"""Comparing detections of two sources, and images as files."""

import os

import numpy as np

# float32 makes one image's result independent of its neighbours to within rounding (a server answers to
# hundredths of a pixel). Another precision can be tried with this variable: kernels chosen by batch size
# then round differently.
PRECISION = os.environ.get("DAMOYOLO_TEST_PRECISION", "fp32")
# The backend, as `backend` in the settings; every one has to give the same answers.
BACKEND = os.environ.get("DAMOYOLO_TEST_BACKEND", "auto")
# An ONNX file to pack for that backend; in a quantised one, rounding can take a value to the next step.
ONNX = os.environ.get("DAMOYOLO_TEST_ONNX")
EXACT = PRECISION == "fp32" and ONNX is None
SCORE_TOLERANCE = 2e-4 if EXACT else 2e-2
BOX_TOLERANCE_PX = 0.02 if EXACT else 2.0


def assert_same_detections(
    answer, expected, score_tolerance=SCORE_TOLERANCE, box_tolerance_px=BOX_TOLERANCE_PX, score_threshold=0.25
):
    """A server's answer holds the detections `expected`, whatever the order among nearly equal scores.

    Only a detection whose score lies within the tolerance of the threshold may be there in one alone.
    """
    height, width = expected.image_size_hw
    assert (answer["width"], answer["height"]) == (width, height)
    boxes = expected.boxes_xyxy.clip(0, [width, height, width, height])
    unmatched = set(range(len(expected)))
    for found in answer["detections"]:
        match = min(
            (index for index in unmatched if expected.class_ids[index] == found["class_id"]),
            key=lambda index: float(np.abs(boxes[index] - found["bbox"]).max()),
            default=None,
        )
        if match is None:
            assert found["score"] <= score_threshold + score_tolerance, f"{found} was not expected"
            continue
        assert abs(float(expected.scores[match]) - found["score"]) <= score_tolerance, found
        assert float(np.abs(boxes[match] - found["bbox"]).max()) <= box_tolerance_px, found
        unmatched.remove(match)
    missing = [index for index in unmatched if expected.scores[index] > score_threshold + score_tolerance]
    assert not missing, f"missing: {[(expected.class_ids[i], expected.scores[i]) for i in missing]}"


def iou(box_a, box_b):
    """Intersection over union of two xyxy boxes."""
    width = min(box_a[2], box_b[2]) - max(box_a[0], box_b[0])
    height = min(box_a[3], box_b[3]) - max(box_a[1], box_b[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (box_a, box_b)]
    return shared / (sum(areas) - shared)


def assert_tensors_hold(tensors, expected):
    """The tensors of an answer hold the detections of JSON answers, image by image, within rounding.

    Detections with nearly equal scores may change places. expected: the detections of each image.
    """
    assert tensors["counts"] == [len(found) for found in expected]
    rows = list(
        zip(tensors["scores"], tensors["class_ids"], tensors["labels"], tensors["boxes"], strict=True)
    )
    for found in expected:
        own, rows = rows[: len(found)], rows[len(found) :]
        scores = [score for score, *_ in own]
        assert scores == sorted(scores, reverse=True)
        left = list(found)
        for score, class_id, label, box in own:
            match = min(left, key=lambda each: float(np.abs(np.subtract(each["bbox"], box)).max()))
            assert (match["class_id"], match["label"]) == (class_id, label)
            assert abs(match["score"] - score) <= SCORE_TOLERANCE
            assert float(np.abs(np.subtract(match["bbox"], box)).max()) <= BOX_TOLERANCE_PX
            left.remove(match)
    assert rows == []
