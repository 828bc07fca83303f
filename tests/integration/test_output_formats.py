"""Every format of an answer from a real server, read by the libraries that it is meant for."""

import base64
import contextlib
import io
import json
import subprocess

import numpy as np
import pytest
import requests
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from damoyolo.coco_categories import coco_category_ids
from damoyolo.response import CONTENT_TYPES, SINGLE_IMAGE_FORMATS

TIMEOUT_S = 120.0
CLASS_NAMES = ("Platelets", "RBC", "WBC")


def detect(url, encoded, output_format, **headers):
    """The response to one image."""
    headers["X-Detect-Format"] = output_format
    response = requests.post(url, data=encoded, headers=headers, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == CONTENT_TYPES[output_format]
    return response


def detect_instances(url, images, output_format, **options):
    """The response to several images in one request."""
    instances = [{"b64": base64.b64encode(encoded).decode()} for encoded in images]
    document = {"instances": instances, "format": output_format, **options}
    return requests.post(url, json=document, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def plain(url, smears):
    """The answers as JSON, by image."""
    return {name: detect(url, encoded, "json").json() for name, (encoded, _) in smears.items()}


def columns(answer):
    """The detections of the JSON by property."""
    found = answer["detections"]
    return {
        "boxes": [each["bbox"] for each in found],
        "scores": [each["score"] for each in found],
        "class_ids": [each["class_id"] for each in found],
        "labels": [each["label"] for each in found],
    }


def coco_truth(smears):
    """The annotated cells as pycocotools has them; images are numbered from 100."""
    ids = dict(zip(CLASS_NAMES, coco_category_ids(CLASS_NAMES), strict=True))
    cells = [(number, *cell) for number, (_, found) in enumerate(smears.values(), 100) for cell in found]
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": number} for number in range(100, 100 + len(smears))],
        "categories": [{"id": category_id, "name": name} for name, category_id in ids.items()],
        "annotations": [
            {
                "id": annotation_id,
                "image_id": image_id,
                "category_id": ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            for annotation_id, (image_id, label, x1, y1, x2, y2) in enumerate(cells, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it reports each step there
        truth.createIndex()
    return truth


def average_precision(truth, results):
    """AP at an IoU of 0.35, by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.iouThrs = np.array([0.35])  # cells are annotated with a margin (test_prediction.py)
        evaluation.evaluate()
        evaluation.accumulate()
    return float(evaluation.eval["precision"][0, :, :, 0, -1].mean())


def test_pycocotools_evaluates_coco_results_of_single_images_and_of_several(url, smears, tmp_path):
    images = [encoded for encoded, _ in smears.values()]
    one_by_one = []
    for number, encoded in enumerate(images, start=100):
        one_by_one += detect(url, encoded, "coco", **{"X-Detect-Image-Id": str(number)}).json()
    together = detect_instances(url, images, "coco", image_id=100)
    results_file = tmp_path / "results.json"
    results_file.write_bytes(together.content)  # as it is: the answer is a results file

    truth = coco_truth(smears)
    assert {entry["image_id"] for entry in one_by_one} == set(truth.getImgIds())
    assert average_precision(truth, one_by_one) == 1.0
    assert average_precision(truth, str(results_file)) == 1.0


def test_coco_results_and_the_json_have_the_same_boxes(url, smears, plain):
    for name, (encoded, _) in smears.items():
        expected = columns(plain[name])
        results = COCO()
        results.dataset = {"images": [{"id": 0}], "categories": [], "info": {}}
        with contextlib.redirect_stdout(io.StringIO()):
            results.createIndex()
            loaded = results.loadRes(detect(url, encoded, "coco").json()).dataset["annotations"]
        corners = [[x, y, x + width, y + height] for x, y, width, height in (each["bbox"] for each in loaded)]
        np.testing.assert_allclose(corners, expected["boxes"], rtol=0, atol=1e-9)
        assert [each["score"] for each in loaded] == expected["scores"]
        assert [each["category_id"] for each in loaded] == [each + 1 for each in expected["class_ids"]]


def test_supervision_reads_its_format_from_the_response_itself(
    url, smears, plain, client_python, project_dir
):
    images = [str(project_dir / "tests/data/smears" / f"{name}.jpg") for name in smears]
    script = project_dir / "tests/clients/read_supervision.py"
    done = subprocess.run(
        [str(client_python), str(script), url, *images], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name, read in zip(smears, json.loads(done.stdout)["read"], strict=True):
        expected = columns(plain[name])
        np.testing.assert_allclose(read.pop("boxes"), expected.pop("boxes"), rtol=0, atol=1e-9)
        assert read == expected


def test_arrays_become_numpy_arrays_without_a_loop(url, smears, plain):
    for name, (encoded, _) in smears.items():
        answer = detect(url, encoded, "arrays").json()
        boxes, scores = np.array(answer["boxes"], np.float32), np.array(answer["scores"])
        assert boxes.shape == (len(scores), 4)
        expected = columns(plain[name])
        assert {key: answer[key] for key in expected} == expected
        assert (answer["width"], answer["height"]) == (640, 480)


def test_yolo_text_loads_with_numpy(url, smears, plain):
    for name, (encoded, _) in smears.items():
        text = detect(url, encoded, "yolo").text
        lines = np.loadtxt(io.StringIO(text)).reshape(-1, 6)
        expected = columns(plain[name])
        centres, sizes = lines[:, 1:3] * (640, 480), lines[:, 3:5] * (640, 480)
        corners = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1)
        # Centre and half the size are rounded to 6 decimals of the image's side.
        np.testing.assert_allclose(corners, expected["boxes"], rtol=0, atol=0.751e-6 * 640)
        assert lines[:, 0].tolist() == expected["class_ids"]
        assert lines[:, 5].tolist() == expected["scores"]


@pytest.mark.parametrize(
    ("output_format", "expected"),
    [
        ("json", {"width": 640, "height": 480, "detections": []}),
        ("coco", []),
        (
            "arrays",
            {"width": 640, "height": 480, "boxes": [], "scores": [], "class_ids": [], "labels": []},
        ),
        ("supervision", {"image": {"width": 640, "height": 480}, "predictions": []}),
        ("yolo", None),
    ],
)
def test_an_image_without_detections_is_answered_in_every_format(url, smear, output_format, expected):
    response = detect(url, smear, output_format, **{"X-Detect-Score-Threshold": "1"})
    if expected is None:
        assert response.content == b""
    else:
        assert response.json() == expected


@pytest.mark.parametrize("output_format", ["json", "arrays", "supervision"])
def test_several_images_are_answered_each_as_alone(url, smears, output_format):
    images = [encoded for encoded, _ in smears.values()]
    predictions = detect_instances(url, images, output_format).json()["predictions"]
    assert predictions == [detect(url, encoded, output_format).json() for encoded in images]


@pytest.mark.parametrize("output_format", SINGLE_IMAGE_FORMATS)
def test_a_format_for_one_image_says_so_for_several(url, smear, output_format):
    response = detect_instances(url, [smear, smear], output_format)
    assert response.status_code == 400
    assert response.json()["type"] == "InvalidOption"
    assert f"format is {output_format} for 2 images" in response.json()["message"]
    assert detect_instances(url, [smear], output_format).content == detect(url, smear, output_format).content


def test_a_format_that_does_not_exist_is_refused_with_those_that_do(url, smear):
    response = requests.post(url, data=smear, headers={"X-Detect-Format": "xml"}, timeout=TIMEOUT_S)
    assert response.status_code == 400
    assert ", ".join(CONTENT_TYPES) in response.json()["message"]
