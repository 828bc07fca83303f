"""Figures of a soak, and what counts as a wrong answer."""

import json

import pytest

from lib.load.mixed_requests import MixedRequest
from lib.load.soak import SoakRecord

from damoyolo.errors import CorruptImageError
from damoyolo.service import Answer
from doubles.images import encode_jpeg, make_pixels

BOX = {"class_id": 0, "label": "cat", "score": 0.5, "bbox": [1.0, 2.0, 3.0, 4.0]}
JSON = "application/json"


def as_json(*detections):
    return json.dumps({"width": 64, "height": 48, "detections": detections}).encode()


def test_latencies_are_given_for_full_minutes():
    record = SoakRecord(answers=[(second, 10.0 if second < 60 else 20.0) for second in range(130)])
    assert [minute["p99"] for minute in record.latencies_by_minute()] == [10.0, 20.0]


def test_memory_slopes_are_those_of_the_last_part():
    sizes = [(0.0, 500.0), (1800.0, 1000.0), (2700.0, 1010.0), (3600.0, 1020.0)]
    record = SoakRecord(memory_mb=[(at, {"worker": size}) for at, size in sizes])
    assert record.memory_slopes_mb_per_h(1800) == {"worker": pytest.approx(40.0)}


SUCCESS = MixedRequest(b"", {}, Answer(as_json(BOX), JSON))
REFUSAL = MixedRequest(b"", {}, Answer(b'{"code": 422}', JSON, CorruptImageError("broken")))
DRAWN = MixedRequest(b"", {}, Answer(encode_jpeg(make_pixels(48, 64)), "image/jpeg"))


@pytest.mark.parametrize(
    ("request_", "answer", "problem"),
    [
        (SUCCESS, (200, JSON, as_json({**BOX, "score": 0.51})), ""),
        (SUCCESS, (200, JSON, as_json()), "other content than in process"),
        (SUCCESS, (503, JSON, b"{}"), "status 503 in place of 200"),
        (SUCCESS, (200, "text/plain", as_json(BOX)), "text/plain in place of application/json"),
        (REFUSAL, (422, JSON, b'{"code": 422}'), ""),
        (REFUSAL, (422, JSON, b'{"code": 415}'), "other content than in process"),
        (REFUSAL, (200, JSON, as_json(BOX)), "status 200 in place of 422"),
        (DRAWN, (200, "image/jpeg", encode_jpeg(make_pixels(48, 64, seed=1))), ""),
        (DRAWN, (200, "image/jpeg", encode_jpeg(make_pixels(64, 48))), "a drawn image of another size"),
    ],
)
def test_an_answer_is_compared_with_that_in_process(request_, answer, problem):
    assert request_.problem_with(*answer) == problem
