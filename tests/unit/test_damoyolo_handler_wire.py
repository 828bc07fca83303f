"""No answer can end the worker or shift the answers of a batch: the handler behind TorchServe's own encoder.

The cases are those of TorchServe 0.12 that end a worker or make it wait for ever: a content type, phrase
or header that is not one line of ASCII (its length is counted in characters and sent in bytes), a status that
is no int or no status, an item that is no bytes or larger than the server sends, a list of another length.
"""

import json
import logging
import struct

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ts.service import Service

from damoyolo.detector import SETTINGS_FILE
from damoyolo.errors import CorruptImageError, ImageTooLargeError
from damoyolo.structures import Detections, Work
from damoyolo_handler import DamoYoloHandler
from doubles.tiny_archive import write_tiny_archive

MAX_RESPONSE_BYTES = 3000
SECRET = "bytes of a body"


class ScriptedDetector:
    """Finds, refuses or fails as the first byte of an image says."""

    def __init__(self, detector):
        self.config = detector.config
        self.device = detector.device
        self.time_budget = detector.time_budget

    def detect(self, images, options, time_stage):
        if any(image[:1] == b"!" for image in images):
            raise ValueError(SECRET)
        return [self._outcome(bytes(image)) for image in images]

    def _outcome(self, image):
        if image[:1] == b"#":
            return CorruptImageError("corrupt: \u00fc\r\n\0 \U0001f4a5")
        if image[:1] == b"$":
            return ImageTooLargeError("x" * 500)
        count = image[0]
        boxes = np.full((count, 4), np.nan, np.float32)
        return Detections(boxes, np.full(count, np.inf, np.float32), np.ones(count, np.int64), (10, 10))

    def read_work(self):
        return Work()

    def close(self):
        """Nothing is held."""


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = write_tiny_archive(tmp_path_factory.mktemp("wire") / "model")
    settings_file = folder / SETTINGS_FILE
    config = yaml.safe_load(settings_file.read_text())
    config["handler"]["max_response_bytes"] = MAX_RESPONSE_BYTES
    config["handler"]["class_names"] = ["größe\r\n", "\U0001f4a5"]
    settings_file.write_text(yaml.safe_dump(config))
    manifest = {"model": {"modelName": "damoyolo", "configFile": SETTINGS_FILE}}
    handler = DamoYoloHandler()
    threads = torch.get_num_threads()
    made = Service("damoyolo", str(folder), manifest, handler.handle, None, 8, metrics_cache=_Metrics())
    made.set_cl_socket(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TS_DECODE_INPUT_REQUEST", "true")  # the handler changes it; restored afterwards
        handler.initialize(made.context)
        handler.service.detector.close()
        handler.service.detector = ScriptedDetector(handler.service.detector)
        yield made
    handler.service.close()
    torch.set_num_threads(threads)
    logging.captureWarnings(False)


class _Metrics:
    """Metrics of a server that refuses everything of the handler."""

    request_ids = None

    def add_time(self, *_):
        """TorchServe's own, after each batch."""

    def get_metric(self, name, *_):
        if name != "PredictionTime":
            raise RuntimeError("no metrics")


def wire_request(number, fields, headers):
    return {
        "requestId": str(number).encode(),
        "parameters": [
            {"name": name, "value": bytearray(value), "contentType": content_type}
            for name, (value, content_type) in fields.items()
        ],
        "headers": [{"name": name.encode(), "value": value.encode()} for name, value in headers.items()],
    }


def read_strictly(message, count):
    """The answers of an encoded batch, each checked as far as the server relies on it."""
    position = 0

    def number():
        nonlocal position
        (value,) = struct.unpack_from("!i", message, position)
        position += 4
        return value

    def data():
        nonlocal position
        length = number()
        assert 0 <= length <= len(message) - position
        position += length
        return bytes(message[position - length : position])

    def line():
        text = data().decode("ascii")
        assert text.isprintable()
        return text

    assert number() == 200
    data()
    answers = []
    for index in range(count):
        assert line() == str(index)
        content_type, status, reason = line(), number(), line()
        assert 200 <= status < 600
        assert reason == "OK" if status == 200 else reason
        headers = {line(): line() for _ in range(number())}
        assert headers == {"content-type": content_type}
        body = data()
        assert len(body) <= MAX_RESPONSE_BYTES
        if content_type == "application/json":
            assert body.isascii()
            answers.append((status, json.loads(body, parse_constant=pytest.fail)))
        else:
            answers.append((status, None))
    assert number() == -1
    assert position == len(message)
    assert SECRET.encode() not in message
    return answers


GOOD = bytes([1])
images = (
    st.sampled_from((GOOD, bytes([0]), bytes([200]), b"!", b"#", b"$", b"", b'{"image": 5}')) | st.binary()
)
content_types = st.none() | st.sampled_from(("image/jpeg", "application/json", "text/\u00fc\r\n"))
field_names = st.sampled_from(("body", "data", "image", "classes", "max_detections")) | st.text(max_size=9)
values = images | st.text(max_size=9).map(str.encode)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
header_names = (
    st.sampled_from(
        ("Accept", "Content-Type", "describe", "explain", "X-Detect-Classes", "X-Detect-Format", "body")
    )
    | texts
)
header_values = texts | st.sampled_from(("True", "image/png", "image/jpeg", "png", "application/json"))
requests = st.tuples(
    st.dictionaries(field_names, st.tuples(values, content_types), max_size=4),
    st.dictionaries(header_names, header_values, max_size=4),
)


@given(st.lists(requests, min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_any_batch_is_answered_item_by_item(service, batch):
    message = service.predict([wire_request(number, *request) for number, request in enumerate(batch)])
    read_strictly(message, len(batch))


@given(requests, requests)
@settings(max_examples=200, deadline=None)
def test_a_good_request_is_answered_the_same_beside_any_others(service, one, another):
    good = ({"body": (GOOD, "image/jpeg")}, {})
    (alone,) = read_strictly(service.predict([wire_request(0, *good)]), 1)
    assert alone[0] == 200
    batch = [wire_request(number, *request) for number, request in enumerate((one, good, another))]
    assert read_strictly(service.predict(batch), 3)[1] == alone


def test_the_model_card_is_an_object_of_ascii_json(service):
    batch = [wire_request(0, {}, {"describe": "True"}), wire_request(1, {"body": (b"", None)}, {})]
    (status, card), (other, _) = read_strictly(service.predict(batch), 2)
    assert (status, other) == (200, 400)
    assert card["class_names"] == ["größe\r\n", "\U0001f4a5"]
    assert card["limits"]["max_response_bytes"] == MAX_RESPONSE_BYTES
