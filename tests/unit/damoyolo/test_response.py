import json

import numpy as np
import pytest

from damoyolo.errors import CorruptImageError, ImageTooLargeError, InvalidOptionError, RequestError
from damoyolo.response import format_error, format_json, format_json_predictions
from doubles.detections import make_detections

CLASS_NAMES = ("cell", 'a "quoted", name', "Zelle größer 細胞")


def test_json_has_the_documented_form_and_is_compact_ascii():
    detections = make_detections([[1.25, 2.5, 30, 40], [5, 6, 7, 8.125]], [1, 2], [0.75, 0.5])
    assert format_json(detections, CLASS_NAMES) == (
        rb'{"width":200,"height":120,"detections":['
        rb'{"class_id":1,"label":"a \"quoted\", name","score":0.750000,"bbox":[1.25,2.50,30.00,40.00]},'
        rb'{"class_id":2,"label":"Zelle gr\u00f6\u00dfer \u7d30\u80de","score":0.500000,'
        rb'"bbox":[5.00,6.00,7.00,8.12]}]}'
    )
    assert format_json(make_detections([]), CLASS_NAMES) == b'{"width":200,"height":120,"detections":[]}'


def test_numbers_lose_less_than_the_stated_decimals():
    random = np.random.default_rng(0)
    boxes = (random.random((300, 4)) * 119).astype(np.float32)
    scores = np.sort(random.random(300).astype(np.float32))[::-1]
    detections = make_detections(boxes.tolist(), scores=scores.tolist())
    answer = json.loads(format_json(detections, CLASS_NAMES))["detections"]
    np.testing.assert_allclose([item["bbox"] for item in answer], boxes, rtol=0, atol=0.00501)
    np.testing.assert_allclose([item["score"] for item in answer], scores, rtol=0, atol=0.51e-6)
    assert [item["score"] for item in answer] == sorted((item["score"] for item in answer), reverse=True)


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([-5, -0.5, 205, 120.5], [0, 0, 200, 120]),
        ([float("nan"), -float("inf"), float("inf"), 5], [0, 0, 200, 5]),
    ],
)
def test_boxes_are_clipped_to_the_image_and_numbers_are_finite(box, clipped):
    (found,) = json.loads(
        format_json(make_detections([box], scores=[float("nan")]), CLASS_NAMES), parse_constant=pytest.fail
    )["detections"]
    assert found["bbox"] == clipped
    assert found["score"] == 0


def test_predictions_hold_each_image_as_it_is_alone():
    batch = [make_detections([[1, 2, 3, 4]]), make_detections([], image_size_hw=(7, 9))]
    answer = json.loads(format_json_predictions(batch, CLASS_NAMES))
    assert answer == {"predictions": [json.loads(format_json(single, CLASS_NAMES)) for single in batch]}


@pytest.mark.parametrize(
    "error_type", [RequestError, InvalidOptionError, CorruptImageError, ImageTooLargeError]
)
def test_an_error_carries_code_type_and_message(error_type):
    body = format_error(error_type('größe is "x"\n'))
    assert body.isascii()
    assert json.loads(body) == {
        "code": error_type.status,
        "type": error_type.kind,
        "message": 'größe is "x"\n',
    }
