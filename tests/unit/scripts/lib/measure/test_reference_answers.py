"""Answers compared with the reference."""

import json

from lib.measure.reference_answers import Reference
from lib.measure.request_forms import BASE64_JSON, OBJECT_DETECTOR, RAW

SURE = {"class_id": 1, "label": "RBC", "score": 0.9, "bbox": [1.0, 2.0, 30.0, 40.0]}
WEAK = {"class_id": 2, "label": "WBC", "score": 0.3, "bbox": [50.0, 50.0, 80.0, 80.0]}


def text(*found):
    return json.dumps({"detections": found}).encode()


REFERENCE = Reference(100.0, "fp32", [text(SURE, WEAK)], [[SURE, WEAK]])


def check(body, form):
    return REFERENCE.check([({}, body)], form)


def test_equal_is_byte_for_byte_and_right_within_the_tolerances_of_the_precision():
    assert check(text(SURE, WEAK), RAW) == {"checked": 1, "equal": 1, "wrong": []}
    near = {**SURE, "score": 0.9005}
    assert check(text(near, WEAK), RAW) == {"checked": 1, "equal": 0, "wrong": []}
    assert len(check(text({**SURE, "score": 0.89}, WEAK), RAW)["wrong"]) == 2  # one not expected, one missing


def test_the_plain_detector_may_differ_as_much_as_float16():
    assert check(text({**SURE, "score": 0.89}, WEAK), BASE64_JSON)["wrong"] == []
    assert len(check(text({**SURE, "score": 0.87}, WEAK), BASE64_JSON)["wrong"]) == 2


def test_the_object_detector_is_not_expected_to_answer_weak_detections():
    rows = json.dumps([{"RBC": SURE["bbox"], "score": 0.9}]).encode()
    assert check(rows, OBJECT_DETECTOR)["wrong"] == []
    assert check(b"[]", OBJECT_DETECTOR)["wrong"] == [
        "image 0: RBC 0.900 at [1.0, 2.0, 30.0, 40.0] is missing"
    ]
