"""How each server takes an image and gives detections. Imports no torch."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from damoyolo.inference_answer import ELEMENT_LENGTH, JSON_LENGTH_HEADER

# Of the model in deploy/triton.
INPUT_NAME, OUTPUT_NAME = "image", "answer"
JSON_PART_BYTES = 256

Detection = Mapping[str, Any]  # label, score, bbox (x1, y1, x2, y2 in pixels)
Answer = tuple[Mapping[str, str], bytes]  # headers with names in lower case, body


@dataclass(frozen=True)
class RequestForm:
    """The form of requests to a server and of its answers.

    body: an encoded image as the body of a POST with these headers.
    json_of: the JSON of the detections in an answer.
    detections: what that JSON says.
    lowest_score: what is below is not answered.
    tolerances: name in TOLERANCES of how far detections may be from the reference; None takes those of the
        archive's precision.
    """

    headers: tuple[tuple[str, str], ...]
    body: Callable[[bytes], bytes]
    json_of: Callable[[Answer], bytes]
    detections: Callable[[bytes], Sequence[Detection]]
    lowest_score: float = 0.25
    tolerances: str | None = None


def _detections(text: bytes) -> Sequence[Detection]:
    found: Sequence[Detection] = json.loads(text)["detections"]
    return found


def _of_object_detector(text: bytes) -> Sequence[Detection]:
    """Of TorchServe's handler: a list of {label: box, "score": score}."""
    rows = json.loads(text)
    return [
        {"label": label, "score": row["score"], "bbox": box}
        for row in rows
        for label, box in row.items()
        if label != "score"
    ]


def _body(answer: Answer) -> bytes:
    return answer[1]


def _as_is(image: bytes) -> bytes:
    return image


def _base64_json(image: bytes) -> bytes:
    return json.dumps({"image_data": base64.b64encode(image).decode()}).encode()


def _tensor(image: bytes) -> bytes:
    """The Open Inference Protocol with binary data; the JSON part is padded to one length for all images."""
    tensor = ELEMENT_LENGTH.pack(len(image)) + image
    entry = {
        "name": INPUT_NAME,
        "datatype": "BYTES",
        "shape": [1, 1],
        "parameters": {"binary_data_size": len(tensor)},
    }
    output = {"name": OUTPUT_NAME, "parameters": {"binary_data": True}}
    document = json.dumps({"inputs": [entry], "outputs": [output]}).encode()
    return document.ljust(JSON_PART_BYTES) + tensor


def _of_tensor(answer: Answer) -> bytes:
    headers, body = answer
    return body[int(headers[JSON_LENGTH_HEADER.lower()]) + ELEMENT_LENGTH.size :]


# The plain detector does not round pixels to whole numbers after resizing.
PLAIN_TOLERANCES = "fp16"
_OCTETS = (("Content-Type", "application/octet-stream"),)
RAW = RequestForm(_OCTETS, _as_is, _body, _detections)
OBJECT_DETECTOR = RequestForm(
    _OCTETS, _as_is, _body, _of_object_detector, lowest_score=0.5, tolerances=PLAIN_TOLERANCES
)
BASE64_JSON = RequestForm(
    (("Content-Type", "application/json"),), _base64_json, _body, _detections, tolerances=PLAIN_TOLERANCES
)
TENSORS = RequestForm(
    (("Content-Type", "application/octet-stream"), (JSON_LENGTH_HEADER, str(JSON_PART_BYTES))),
    _tensor,
    _of_tensor,
    _detections,
)
