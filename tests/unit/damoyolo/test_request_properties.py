"""Whatever a client sends is read or refused in plain words, and a number means the same everywhere."""

import base64
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damoyolo.config import ServingConfig
from damoyolo.errors import RequestError
from damoyolo.request import OPTION_NAMES, ImageRequest, RequestParser
from damoyolo.response import CONTENT_TYPES, SINGLE_IMAGE_FORMATS
from damoyolo.response_formats import MAX_IMAGE_ID

CONFIG = ServingConfig(class_names=("cell", "traffic light", "7"), max_instances=3)
PARSER = RequestParser(CONFIG)
IMAGE = b"\xff\xd8\xff\xe0 an image"
IMAGE_BASE64 = base64.b64encode(IMAGE).decode()

names = st.sampled_from(
    (*OPTION_NAMES, "body", "data", "image", "instances", "model_name", "describe")
) | st.text(max_size=20)
header_names = (
    names | names.map(lambda name: "X-Detect-" + name) | st.sampled_from(("Accept", "Content-Type"))
)
texts = st.text(max_size=40) | st.sampled_from(
    ("0.5", "1", "true", "cell", "json", "application/json", "image/jpeg;q=0.5, */*", "1_0", "nan", "1e999")
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(IMAGE_BASE64),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
documents = st.dictionaries(names, json_values, max_size=5)
encoded_documents = documents.map(lambda document: json.dumps(document).encode())
bodies = (
    st.binary(max_size=80).map(bytearray)
    | st.binary(max_size=80).map(lambda tail: bytearray(b"{" + tail))
    | encoded_documents.map(bytearray)
    | texts.map(lambda text: bytearray(text, "utf-8", "surrogatepass"))
    | st.just(bytearray(IMAGE))
)
rows = st.dictionaries(names, bodies | json_values, max_size=5)
headers = st.dictionaries(header_names, texts | st.just({"content-type": "application/json"}), max_size=5)
JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")


def parse(row, head=None):
    """The request or its error, which must be fit for an answer and for a log."""
    try:
        request = PARSER.parse(row, head or {})
    except RequestError as error:
        request = error
    if isinstance(request, RequestError):
        assert 400 <= request.status < 500
        assert str(request).isascii()
        assert str(request).isprintable()
        assert len(str(request)) < 500
        return request
    assert isinstance(request, ImageRequest)
    assert 1 <= len(request.images) <= CONFIG.max_instances
    assert all(len(image) > 0 for image in request.images)
    options = request.options
    assert 0 <= options.score_threshold <= 1
    assert 0 <= options.iou_threshold <= 1
    assert 1 <= options.max_detections <= CONFIG.max_detections_limit
    assert options.class_ids is None or all(0 <= each < 3 for each in options.class_ids)
    assert request.output_format in CONTENT_TYPES
    assert len(request.images) == 1 or request.output_format not in SINGLE_IMAGE_FORMATS
    assert 0 <= request.image_id <= MAX_IMAGE_ID
    return request


@given(rows, headers)
@settings(max_examples=500, deadline=None)
def test_any_fields_and_headers_are_read_or_refused(row, head):
    parse(row, head)


@given(documents)
@settings(max_examples=300, deadline=None)
def test_a_document_means_the_same_parsed_or_not(document):
    parsed = parse({"body": document})
    encoded = parse({"body": bytearray(json.dumps(document).encode())})
    if isinstance(parsed, RequestError):
        assert isinstance(encoded, RequestError)
    else:
        assert encoded == parsed


@given(encoded_documents, st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_json_is_read_or_refused(encoded, data):
    damaged = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    parse({"body": damaged}, {"Content-Type": "application/json"})


@given(
    st.from_regex(JSON_NUMBER, fullmatch=True)
    | st.text(alphabet="0123456789.+-eE_ \t\u0661\uff11", max_size=8)
    | st.floats().map(str)
    | st.integers().map(str)
)
@settings(max_examples=500, deadline=None)
def test_a_number_as_text_is_accepted_if_json_accepts_it_as_a_number(text):
    stripped = text.strip(" \t\r\n")
    is_number = JSON_NUMBER.fullmatch(stripped) is not None and len(stripped) <= 64
    for name in ("score_threshold", "max_detections"):
        outcomes = [
            parse({"data": bytearray(IMAGE), name: bytearray(text.encode())}),
            parse({"body": bytearray(IMAGE)}, {"X-Detect-" + name.replace("_", "-"): text}),
        ]
        if is_number:
            document = f'{{"image": "{IMAGE_BASE64}", "{name}": {stripped}}}'
            outcomes.append(parse({"body": bytearray(document.encode())}))
        accepted = [outcome.options for outcome in outcomes if isinstance(outcome, ImageRequest)]
        assert len(accepted) in ((0, len(outcomes)) if is_number else (0,))
        assert len({getattr(options, name) for options in accepted}) <= 1


@pytest.mark.parametrize("place", ["form", "json"])
@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_a_refusal_never_repeats_more_than_the_start_of_what_was_sent(place, text):
    long = text + "x" * 5000
    value = bytearray(long.encode("utf-8", "surrogatepass"))
    document = bytearray(json.dumps({"image": IMAGE_BASE64, "classes": long}).encode())
    outcome = parse({"body": document} if place == "json" else {"data": bytearray(IMAGE), "classes": value})
    assert isinstance(outcome, RequestError)
    assert "x" * 61 not in str(outcome)
