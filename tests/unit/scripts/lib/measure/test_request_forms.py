"""What is sent to each server, and what is read from its answers."""

import base64
import json

from lib.measure.request_forms import BASE64_JSON, JSON_PART_BYTES, OBJECT_DETECTOR, RAW, TENSORS

FOUND = [{"class_id": 1, "label": "RBC", "score": 0.9, "bbox": [1.0, 2.0, 3.0, 4.0]}]
TEXT = json.dumps({"width": 5, "height": 6, "detections": FOUND}).encode()


def test_the_projects_own_servers_take_the_image_as_it_is():
    assert RAW.body(b"image") == b"image"
    assert RAW.json_of(({}, TEXT)) == TEXT
    assert RAW.detections(TEXT) == FOUND


def test_triton_takes_a_tensor_of_bytes_after_json_of_a_fixed_length():
    for image in (b"image", bytes(10_000_000)):
        body = TENSORS.body(image)
        document = json.loads(body[:JSON_PART_BYTES])
        assert document["inputs"][0]["parameters"]["binary_data_size"] == 4 + len(image)
        assert body[JSON_PART_BYTES:] == len(image).to_bytes(4, "little") + image
    assert dict(TENSORS.headers)["Inference-Header-Content-Length"] == str(JSON_PART_BYTES)
    answer = b'{"outputs":[]}' + len(TEXT).to_bytes(4, "little") + TEXT
    assert TENSORS.json_of(({"inference-header-content-length": "14"}, answer)) == TEXT


def test_plain_litserve_takes_base64_in_json():
    assert base64.b64decode(json.loads(BASE64_JSON.body(b"image"))["image_data"]) == b"image"


def test_the_object_detector_answers_a_box_by_the_name_of_its_class():
    text = json.dumps([{"RBC": [1.0, 2.0, 3.0, 4.0], "score": 0.9}]).encode()
    assert OBJECT_DETECTOR.detections(text) == [{key: FOUND[0][key] for key in ("label", "score", "bbox")}]
