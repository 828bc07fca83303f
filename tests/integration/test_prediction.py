"""Answers of a real TorchServe to images in every form, with every option, alone and in batches."""

import base64
import io
import json
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
from PIL import Image, ImageOps
from prometheus_client.parser import text_string_to_metric_families

from damoyolo.structures import DetectionOptions, Detections
from doubles.answers import assert_same_detections, iou
from doubles.images import encode
from doubles.real_server import wait_until

TIMEOUT_S = 120.0
SMEAR_NAMES = ("smear_3", "smear_4", "smear_7")


def predict(url, encoded, headers=None):
    """The answer to an image sent as raw body."""
    response = requests.post(url, data=encoded, headers=headers, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "application/json"
    answer = response.json()
    return answer


def detect_in_process(detector, encoded, options=None):
    """The same image through the detector of this process."""
    (outcome,) = detector.detect([encoded], [options or detector.config.default_options()])
    assert isinstance(outcome, Detections)
    return outcome


@pytest.fixture(scope="session")
def whole_answer(url, smear):
    """The answer to the sample image without any option."""
    return predict(url, smear)


@pytest.mark.parametrize("name", SMEAR_NAMES)
def test_a_sample_smear_comes_back_with_exactly_its_cells(url, smears, name):
    encoded, cells = smears[name]
    answer = predict(url, encoded)
    assert Counter(found["label"] for found in answer["detections"]) == Counter(cell[0] for cell in cells)
    for label, *box in cells:
        best = max(iou(box, found["bbox"]) for found in answer["detections"] if found["label"] == label)
        # The photographs that the weights learned from are annotated with a margin, which weighs most on the
        # smallest cells; the drawn ones know their outline.
        assert best > 0.35, (label, box)
    scores = [found["score"] for found in answer["detections"]]
    assert scores == sorted(scores, reverse=True)


def test_64_concurrent_images_of_different_sizes_equal_the_in_process_results(server, url, smears, detector):
    random = np.random.default_rng(7)
    images = []
    for index in range(16):
        source = Image.open(io.BytesIO(smears[SMEAR_NAMES[index % 3]][0]))
        size = int(random.integers(200, 1600)), int(random.integers(200, 1200))
        images.append(encode(source.resize(size), "JPEG" if index % 4 else "PNG"))
    batches_before = counter_value(server, "damoyolo_batch_size_count")
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda encoded: predict(url, encoded), images * 4))
    expected = [detect_in_process(detector, encoded) for encoded in images]
    for index, answer in enumerate(answers):
        assert_same_detections(answer, expected[index % len(images)])
    # They did share batches: 64 requests in batches of at most 8.
    assert wait_for_counter(server, "damoyolo_batch_size_count", batches_before + 8) < batches_before + 40


def counter_value(server, name, **labels):
    """Sum of a counter over all label sets that hold `labels`."""
    text = requests.get(f"{server.metrics_url}/metrics", timeout=TIMEOUT_S).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(
        sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()
    )


def wait_for_counter(server, name, at_least, **labels):
    """The counter once it has reached a value; the handler sends its counters once a second."""
    wait_until(
        lambda: counter_value(server, name, **labels) >= at_least, f"{name} {labels} of {at_least}", 10
    )
    return counter_value(server, name, **labels)


def test_stage_times_and_errors_arrive_as_metrics(server, url, smear):
    before = {
        stage: counter_value(server, "damoyolo_stage_duration_seconds_sum", stage=stage)
        for stage in ("parse", "preprocess", "network", "postprocess", "respond")
    }
    errors = counter_value(server, "damoyolo_request_errors_total", reason="UnsupportedImage")
    predict(url, smear)
    assert requests.post(url, data=b"no image", timeout=TIMEOUT_S).status_code == 415
    wait_for_counter(server, "damoyolo_request_errors_total", errors + 1, reason="UnsupportedImage")
    for stage, seconds in before.items():
        more = np.nextafter(seconds, 1e9)
        assert wait_for_counter(server, "damoyolo_stage_duration_seconds_sum", more, stage=stage) > seconds


def as_base64(data):
    return base64.b64encode(data).decode()


INPUT_FORMS = {
    "raw octets": lambda data: {"data": data, "headers": {"Content-Type": "application/octet-stream"}},
    "raw jpeg": lambda data: {"data": data, "headers": {"Content-Type": "image/jpeg"}},
    "part data": lambda data: {"files": {"data": data}},
    "part body": lambda data: {"files": {"body": ("a.jpg", data)}},
    "part image": lambda data: {"files": {"image": ("a.jpg", data, "image/jpeg")}},
    "part without file name": lambda data: {"files": {"data": (None, data)}},
    "json image": lambda data: {"json": {"image": as_base64(data)}},
    "json of another type": lambda data: {
        "data": json.dumps({"image": as_base64(data)}).encode(),
        "headers": {"Content-Type": "application/x+json"},
    },
}


@pytest.mark.parametrize("form", INPUT_FORMS)
def test_every_input_form_gives_the_same_answer(url, smear, whole_answer, form):
    response = requests.post(url, **INPUT_FORMS[form](smear), timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    assert response.json() == whole_answer


def test_put_gives_the_same_answer_as_post(url, smear, whole_answer):
    assert requests.put(url, data=smear, timeout=TIMEOUT_S).json() == whole_answer


def test_instances_come_back_as_predictions_in_their_order(url, server, smears, detector):
    images = [smears[name][0] for name in SMEAR_NAMES]
    body = {"instances": [{"b64": as_base64(image)} for image in images]}
    for address in (url, f"{server.inference_url}/v1/models/damoyolo:predict"):
        predictions = requests.post(address, json=body, timeout=TIMEOUT_S).json()["predictions"]
        assert len(predictions) == 3
        for image, prediction in zip(images, predictions, strict=True):
            assert_same_detections(prediction, detect_in_process(detector, image))


@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("WEBP", "RGB", {"lossless": True}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("GIF", "P", {}),
    ],
)
def test_every_image_format_is_served(url, smear, detector, image_format, mode, options):
    source = Image.open(io.BytesIO(smear)).resize((320, 240))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
    else:
        image = source.convert(mode)
    encoded = encode(image, image_format, **options)
    answer = predict(url, encoded)
    assert (answer["width"], answer["height"]) == (320, 240)
    assert answer["detections"]
    assert_same_detections(answer, detect_in_process(detector, encoded))


def test_boxes_refer_to_the_image_as_a_viewer_shows_it(url, smears):
    source = Image.open(io.BytesIO(smears["smear_4"][0]))
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it by 90 degrees clockwise
    encoded = encode(source, "JPEG", exif=exif, quality=95)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    answer = predict(url, encoded)
    assert (answer["width"], answer["height"]) == shown.size == (480, 640)
    for _, x1, y1, x2, y2 in smears["smear_4"][1]:
        turned = [480 - y2, x1, 480 - y1, x2]
        assert max(iou(turned, found["bbox"]) for found in answer["detections"]) > 0.5


@pytest.mark.parametrize("channel", ["header", "field", "json"])
@pytest.mark.parametrize(
    ("name", "value", "keep"),
    [
        ("score_threshold", 0.7, lambda found: [each for each in found if each["score"] > 0.7]),
        ("max_detections", 3, lambda found: found[:3]),
        ("classes", "WBC,Platelets", lambda found: [each for each in found if each["class_id"] in (0, 2)]),
        ("classes", "1", lambda found: [each for each in found if each["class_id"] == 1]),
    ],
)
def test_an_option_works_through_every_channel(url, smear, whole_answer, channel, name, value, keep):
    answer = send_with_option(url, smear, channel, name, value).json()
    expected = keep(whole_answer["detections"])
    assert 0 < len(expected) < len(whole_answer["detections"])
    assert answer["detections"] == expected


def send_with_option(url, smear, channel, name, value):
    if channel == "header":
        header = "X-Detect-" + name.title().replace("_", "-")
        response = requests.post(url, data=smear, headers={header: str(value)}, timeout=TIMEOUT_S)
    elif channel == "field":
        response = requests.post(url, files={"data": smear}, data={name: str(value)}, timeout=TIMEOUT_S)
    else:
        response = requests.post(url, json={"image": as_base64(smear), name: value}, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize(
    "options",
    [
        {"iou_threshold": 0.05},
        {"iou_threshold": 0.95, "score_threshold": 0.05},
        {"iou_threshold": 0.05, "class_agnostic": True, "score_threshold": 0.05},
    ],
)
def test_suppression_options_equal_the_in_process_results(url, smear, detector, options):
    response = requests.post(url, json={"image": as_base64(smear), **options}, timeout=TIMEOUT_S)
    settings = {"score_threshold": 0.25, "iou_threshold": 0.45, "max_detections": 300, **options}
    expected = detect_in_process(detector, smear, DetectionOptions(**settings))
    assert_same_detections(response.json(), expected, score_threshold=settings["score_threshold"])


def test_an_option_as_query_parameter_works_where_the_server_passes_it_on(server, smear):
    address = f"{server.inference_url}/models/damoyolo/invoke?max_detections=2"
    response = requests.post(address, data=smear, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    assert len(response.json()["detections"]) == 2


@pytest.mark.parametrize(
    ("headers", "content_type", "image_format"),
    [
        ({"Accept": "image/jpeg"}, "image/jpeg", "JPEG"),
        ({"Accept": "image/png"}, "image/png", "PNG"),
        ({"X-Detect-Format": "png"}, "image/png", "PNG"),
    ],
)
def test_the_image_comes_back_drawn(url, smear, whole_answer, headers, content_type, image_format):
    response = requests.post(url, data=smear, headers=headers, timeout=TIMEOUT_S)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == content_type
    drawn = Image.open(io.BytesIO(response.content))
    assert drawn.format == image_format
    before = np.asarray(Image.open(io.BytesIO(smear)), dtype=int)
    after = np.asarray(drawn.convert("RGB"), dtype=int)
    assert before.shape == after.shape
    changed = np.abs(before - after).max(axis=2) > 60
    for found in whole_answer["detections"]:
        x1, y1, x2, y2 = (int(value) for value in found["bbox"])
        edges = np.concatenate(
            [
                changed[y1:y2, max(0, x1 - 1) : x1 + 3].any(axis=1),
                changed[max(0, y1 - 1) : y1 + 3, x1:x2].any(axis=0),
            ]
        )
        assert edges.mean() > 0.8, found


@pytest.mark.parametrize(
    ("body", "headers", "status", "kind", "mentions"),
    [
        (b"", {}, 400, "MissingImage", "multipart"),
        (b"no image", {}, 415, "UnsupportedImage", "JPEG"),
        ("truncated", {}, 422, "CorruptImage", ""),
        ("whole", {"X-Detect-Score-Threshold": "7"}, 400, "InvalidOption", "score_threshold"),
        ("whole", {"X-Detect-Treshold": "0.5"}, 400, "InvalidOption", "x-detect-score-threshold"),
        ("whole", {"X-Detect-Classes": "RBC,Horse"}, 400, "InvalidOption", "Platelets"),
        ("huge", {}, 413, "ImageTooLarge", "max_image_pixels"),
    ],
)
def test_a_bad_request_gets_its_own_status_and_says_what_is_accepted(
    url, smear, body, headers, status, kind, mentions
):
    bodies = {
        "whole": smear,
        "truncated": smear[: len(smear) // 2],
        "huge": encode(Image.new("1", (5000, 5000)), "PNG"),
    }
    response = requests.post(
        url, data=bodies[body] if isinstance(body, str) else body, headers=headers, timeout=TIMEOUT_S
    )
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    error = response.json()
    assert (error["code"], error["type"]) == (status, kind)
    assert mentions in error["message"]


def test_corrupt_neighbours_in_a_batch_cost_only_themselves(server, url, smear, whole_answer):
    bodies = [
        smear,
        smear[:5000],
        b"nothing",
        smear,
        smear[: len(smear) // 2],
        smear,
        b"\xff\xd8\xff",
        smear,
    ] * 2
    batches_before = counter_value(server, "damoyolo_batch_size_count")
    with ThreadPoolExecutor(len(bodies)) as pool:
        responses = list(pool.map(lambda body: requests.post(url, data=body, timeout=TIMEOUT_S), bodies))
    for body, response in zip(bodies, responses, strict=True):
        if body is smear:
            assert response.status_code == 200, response.text
            assert [found["label"] for found in response.json()["detections"]] == [
                found["label"] for found in whole_answer["detections"]
            ]
        else:
            assert response.status_code in (415, 422), response.text
    assert wait_for_counter(server, "damoyolo_batch_size_count", batches_before + 2) < batches_before + len(
        bodies
    )


def test_a_batch_of_bad_requests_only_is_answered(url):
    with ThreadPoolExecutor(8) as pool:
        responses = list(
            pool.map(lambda i: requests.post(url, data=b"bad %d" % i, timeout=TIMEOUT_S), range(8))
        )
    assert [response.status_code for response in responses] == [415] * 8


def test_curl_as_in_the_readme_works(url, project_dir, whole_answer):
    image = project_dir / "tests" / "data" / "smears" / "smear_3.jpg"
    command = ["curl", "--silent", "--max-time", "120", "-X", "POST", url, "-T", str(image)]
    assert (
        json.loads(subprocess.run(command, capture_output=True, check=True, timeout=130).stdout)
        == whole_answer
    )
