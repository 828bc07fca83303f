"""Answers of the Open Inference Protocol: the numbers of the ordinary answer, in JSON and as binary data."""

import json
import struct

import numpy as np
import pytest

from damoyolo.inference_answer import OUTPUT_TENSORS, ModelIdentity, TensorRequest, format_tensors
from damoyolo.response import format_json
from damoyolo.structures import Detections

NAMES = ("cell", "größe\n\U0001f4a5")
MODEL = ModelIdentity("damoyolo", "1.0")
DTYPES = {"INT64": "<i8", "FP32": "<f4"}
SHAPES = {"counts": [3], "boxes": [5, 4], "scores": [5], "class_ids": [5], "labels": [5]}


def detections(count, size_hw=(48, 64), seed=0):
    random = np.random.default_rng(seed)
    return Detections(
        random.uniform(-5, 70, (count, 4)).astype(np.float32),
        random.uniform(0, 1, count).astype(np.float32),
        random.integers(0, len(NAMES), count),
        size_hw,
    )


BATCH = [detections(3), detections(0), detections(2, (20, 30), seed=1)]


def elements(data):
    """The elements of a binary tensor of BYTES."""
    found = []
    while data:
        (length,) = struct.unpack_from("<I", data)
        found.append(data[4 : 4 + length])
        data = data[4 + length :]
    return found


def read(body, json_length):
    """Values by name as a client reads them, and the document."""
    document = json.loads(body[:json_length])
    rest = b"" if json_length is None else body[json_length:]
    values = {}
    for output in document["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values[output["name"]] = output["data"]
            continue
        data, rest = rest[:size], rest[size:]
        is_text = output["datatype"] == "BYTES"
        values[output["name"]] = (
            [element.decode() for element in elements(data)]
            if is_text
            else np.frombuffer(data, DTYPES[output["datatype"]]).tolist()
        )
    assert rest == b""
    return values, document


def request(*names, binary=False, request_id=None):
    return TensorRequest(request_id, tuple((name, binary) for name in names or OUTPUT_TENSORS))


@pytest.mark.parametrize("binary", [False, True])
def test_the_tensors_hold_the_numbers_of_the_ordinary_answer(binary):
    body, json_length = format_tensors(BATCH, NAMES, request(binary=binary), MODEL)
    assert (json_length is not None) == binary
    values, document = read(body, json_length)
    assert {output["name"]: output["shape"] for output in document["outputs"]} == SHAPES
    assert document["model_name"] == "damoyolo"
    assert document["model_version"] == "1.0"
    assert "id" not in document
    assert values["counts"] == [3, 0, 2]
    plain = [found for image in BATCH for found in json.loads(format_json(image, NAMES))["detections"]]
    assert values["class_ids"] == [found["class_id"] for found in plain]
    assert values["labels"] == [found["label"] for found in plain]
    # The ordinary answer has 6 and 2 decimals.
    np.testing.assert_allclose(values["scores"], [found["score"] for found in plain], rtol=0, atol=5.1e-7)
    boxes = np.reshape(values["boxes"], (-1, 4))
    np.testing.assert_allclose(boxes, [found["bbox"] for found in plain], rtol=0, atol=0.0051)


def test_json_and_binary_data_hold_the_same_float32():
    as_json, _ = read(*format_tensors(BATCH, NAMES, request(), MODEL))
    as_binary, _ = read(*format_tensors(BATCH, NAMES, request(binary=True), MODEL))
    assert as_json == as_binary
    assert as_json["scores"] == np.concatenate([image.scores for image in BATCH]).tolist()


def test_outputs_come_in_the_order_asked_for_each_in_its_form():
    wanted = TensorRequest("a", (("labels", True), ("counts", False), ("boxes", True)))
    body, json_length = format_tensors(BATCH, NAMES, wanted, MODEL)
    values, document = read(body, json_length)
    assert [output["name"] for output in document["outputs"]] == ["labels", "counts", "boxes"]
    assert document["outputs"][1]["data"] == [3, 0, 2]
    assert "parameters" not in document["outputs"][1]
    assert all("data" not in document["outputs"][index] for index in (0, 2))
    assert len(values["labels"]) == 5


@pytest.mark.parametrize("binary", [False, True])
def test_an_image_without_detections_gives_empty_tensors(binary):
    body, json_length = format_tensors([detections(0)], NAMES, request(binary=binary), MODEL)
    values, document = read(body, json_length)
    assert values == {"counts": [0], "boxes": [], "scores": [], "class_ids": [], "labels": []}
    assert [output["shape"] for output in document["outputs"]] == [[1], [0, 4], [0], [0], [0]]
    if binary:
        assert document["outputs"][1]["parameters"] == {"binary_data_size": 0}


@pytest.mark.parametrize("binary", [False, True])
def test_numbers_that_are_not_finite_become_finite(binary):
    odd = Detections(
        np.full((1, 4), np.nan, np.float32), np.array([np.inf], np.float32), np.array([0]), (48, 64)
    )
    values, _ = read(*format_tensors([odd], NAMES, request(binary=binary), MODEL))
    assert np.isfinite(values["boxes"] + values["scores"]).all()


@pytest.mark.parametrize("request_id", ["", "x", 'größe "\n\U0001f4a5'])
def test_the_id_is_repeated(request_id):
    body, _ = format_tensors(BATCH, NAMES, request("counts", request_id=request_id), MODEL)
    assert body.isascii()
    assert json.loads(body)["id"] == request_id
