"""Odd requests to a real TorchServe: each is answered in its own right, and the worker stays the same."""

import base64
import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import requests

from lib.server.process import describe_model

TIMEOUT_S = 60.0


def post_raw(url, body, headers):
    """Status, reason and text of the answer to headers that `requests` would not send."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=TIMEOUT_S)
    try:
        connection.putrequest("POST", address.path)
        for name, value in [*headers, (b"Content-Length", str(len(body)).encode())]:
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.reason, response.read().decode()
    finally:
        connection.close()


@pytest.fixture
def same_worker(server):
    """Checks that no worker ended meanwhile."""
    before = [worker["pid"] for worker in describe_model(server.management_url, "damoyolo")["workers"]]
    yield
    after = describe_model(server.management_url, "damoyolo")["workers"]
    assert [(worker["pid"], worker["status"]) for worker in after] == [(pid, "READY") for pid in before]


def test_the_management_api_answers_with_the_model_card(server):
    url = f"{server.management_url}/models/damoyolo?customized=true"
    (description,) = requests.get(url, timeout=TIMEOUT_S).json()
    card = description["customizedMetadata"]
    assert card["variant"] == "S"
    assert card["class_names"] == ["Platelets", "RBC", "WBC"]
    assert card["limits"]["max_image_pixels"] == 20_000_000  # as the archive sets it
    assert len(card["weights_sha256"]) == 64


def test_the_header_of_that_question_harms_no_one(server, url, smear, same_worker):
    image = {"Content-Type": "image/jpeg"}
    describe = {**image, "describe": "True"}
    expected = requests.post(url, data=smear, headers=image, timeout=TIMEOUT_S).json()
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda sent: requests.post(url, data=sent[0], headers=sent[1], timeout=TIMEOUT_S),
                [(smear, image), (smear, describe), (b"", describe), (smear, image)] * 4,
            )
        )
    assert {answer.status_code for answer in answers} == {200}
    for index, answer in enumerate(answers):
        if index % 4 == 2:
            assert answer.json()["variant"] == "S"
        else:
            assert len(answer.json()["detections"]) == len(expected["detections"])


@pytest.mark.parametrize(
    ("body", "mentions"),
    [
        ('{"image": NaN}', "NaN"),
        ('{"image": "%s", "image": "%s"}', "name twice"),
        ('{"image": "%s", "max_detections": ' + "9" * 5000 + "}", "digits"),
        ('{"image": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply"),
        ('{"image": [' + "[]," * 200_000 + "1]}", "100000 values"),
        ("[1]", "a list of 1"),
        ('{"image": "%s', "not valid JSON"),
    ],
)
def test_json_is_read_strictly(url, smear, body, mentions, same_worker):
    text = body.replace("%s", base64.b64encode(smear).decode())
    response = requests.post(url, data=text, headers={"Content-Type": "application/json"}, timeout=TIMEOUT_S)
    assert response.status_code == 400
    assert mentions in response.json()["message"]


@pytest.mark.parametrize("number", ["1_0", "\u0661", "\uff11", "01", "1e400", "nan"])
def test_only_a_number_of_json_is_a_number_in_every_place(url, smear, number):
    image = {"Content-Type": "image/jpeg", "X-Detect-Max-Detections": number.encode()}
    invoke = url.replace("/predictions/damoyolo", "/models/damoyolo/invoke")
    document = {"image": base64.b64encode(smear).decode(), "classes": [number]}
    for response in (
        requests.post(url, data=smear, headers=image, timeout=TIMEOUT_S),
        requests.post(url, files={"data": smear}, data={"max_detections": number}, timeout=TIMEOUT_S),
        requests.post(invoke, data=smear, params={"iou_threshold": number}, timeout=TIMEOUT_S),
        requests.post(url, json=document, timeout=TIMEOUT_S),
    ):
        assert response.status_code == 400, response.text
        assert response.json()["type"] == "InvalidOption"


@pytest.mark.parametrize(
    "header",
    [
        (b"Content-Type", b"image/\xff"),
        (b"Content-Type", "image/\U0001f4a5".encode()),
        (b"Content-Type", b"text/plain; charset=nothing"),
        (b"X-Odd", b"a\tb\x7f\xe9"),
        (b"body", b"x"),
        (b"data", b"x"),
        (b"explain", b"True"),
        (b"ts_stream_next", b"true"),
        (b"Accept", b"\xff;q=\xff"),
    ],
)
def test_odd_headers_do_not_matter(url, smear, header, same_worker):
    headers = [header] if header[0] == b"Content-Type" else [(b"Content-Type", b"image/jpeg"), header]
    status, reason, text = post_raw(url, smear, headers)
    assert (status, reason) == (200, "OK")
    assert json.loads(text)["detections"]


def test_hundreds_of_fields_are_refused_in_short(url, smear, same_worker):
    fields = {f"field{number}\U0001f4a5": "1" for number in range(500)}
    response = requests.post(url, files={"data": smear}, data=fields, timeout=TIMEOUT_S)
    assert response.status_code == 400
    assert len(response.content) < 1000
