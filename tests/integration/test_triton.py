"""A real Triton answers as TorchServe does: by hand, by Triton's own clients, alone and in batches."""

import base64
import json
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
import yaml

from lib.archive.members import copy_archive, read_settings

from damoyolo.config import SETTINGS_FILE
from damoyolo.inference_answer import OUTPUT_TENSORS
from doubles.answers import assert_tensors_hold
from doubles.real_server import wait_until
from doubles.served_command import still_running
from doubles.triton_server import triton_server

TIMEOUT_S = 120.0
CLIENT_S = 240.0
NAMES = ("smear_3", "smear_4", "smear_7")


@pytest.fixture(scope="module")
def triton(project_dir, archive, tmp_path_factory):
    with triton_server(project_dir, archive.path, tmp_path_factory.mktemp("triton")) as started:
        yield started


@pytest.fixture(scope="module")
def images(smears):
    return [smears[name][0] for name in NAMES]


def binary_request(images, outputs=None, shape=None, **parameters):
    """Document and body of a request with binary data."""
    data = b"".join(struct.pack("<I", len(image)) + image for image in images)
    size = {"binary_data_size": len(data)}
    tensor = {"name": "image", "datatype": "BYTES", "shape": shape or [len(images), 1], "parameters": size}
    asked = {"outputs": [{"name": name} for name in outputs]} if outputs else {}
    return json.dumps({"inputs": [tensor], "parameters": parameters, **asked}).encode(), data


def infer(triton, document, data):
    return requests.post(
        f"{triton.url}/v2/models/damoyolo/infer",
        data=document + data,
        headers={"Inference-Header-Content-Length": str(len(document))},
        timeout=TIMEOUT_S,
    )


def answer_of(response):
    """The elements of `answer`."""
    assert response.status_code == 200, response.text
    (values,) = (each["data"] for each in response.json()["outputs"] if each["name"] == "answer")
    return values


# ------------------------------------------------------------------------------------ equal to TorchServe


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_threshold": "0.6", "classes": "RBC,Platelets", "max_detections": "4"},
        {"class_agnostic": "true", "iou_threshold": "0.2"},
        {"score_threshold": "1"},
        {"format": "coco", "image_id": "7"},
        {"format": "arrays"},
        {"format": "supervision"},
        {"format": "yolo"},
    ],
    ids=str,
)
def test_answers_are_those_of_torchserve_byte_for_byte(triton, url, images, options):
    for image in images:
        expected = requests.post(url, files={"data": image}, data=options, timeout=TIMEOUT_S)
        assert expected.status_code == 200
        (found,) = answer_of(infer(triton, *binary_request([image], ["answer"], **options)))
        assert found.encode() == expected.content


BAD_REQUESTS = {
    "no image": (lambda image: b"no image", {}),
    "text": (lambda image: b'{"instances": 5}', {}),
    "a damaged image": (lambda image: image[: len(image) // 2], {}),
    "a header alone": (lambda image: image[:200], {}),
    "a huge image": (
        lambda image: (
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
            + struct.pack(">II", 30_000, 30_000)
            + b"\x08\x02\0\0\0"
            + b"\x2d\x8b\x9c\x7c"
        ),
        {},
    ),
    "a threshold": (None, {"score_threshold": "2"}),
    "a number": (None, {"max_detections": "many"}),
    "a class": (None, {"classes": "RBC,cat"}),
    "an unknown option": (None, {"treshold": "0.5"}),
    "a format": (None, {"format": "xml"}),
    "an id": (None, {"image_id": "-1"}),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_errors_are_those_of_torchserve_byte_for_byte(triton, url, images, name):
    damage, options = BAD_REQUESTS[name]
    content = damage(images[0]) if damage else images[0]
    expected = requests.post(url, files={"data": content}, data=options, timeout=TIMEOUT_S)
    assert 400 <= expected.status_code < 500
    found = infer(triton, *binary_request([content], **options))
    assert found.status_code == 400
    assert found.json()["error"].encode() == expected.content


def test_an_element_that_is_no_single_image_costs_only_its_own_request(triton, url, images):
    """TorchServe answers these, in forms that the tensors of one element have no place for."""
    text = base64.b64encode(images[0]).decode()
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}
    bad = [
        json.dumps({"inputs": [tensor]}).encode(),
        json.dumps({"instances": [{"b64": text}, {"b64": text}]}).encode(),
    ]
    expected = requests.post(url, files={"data": images[0]}, timeout=TIMEOUT_S).text
    with ThreadPoolExecutor(4) as pool:
        # The archive waits 100 ms for a batch.
        pending = [pool.submit(infer, triton, *binary_request([each])) for each in (*bad, images[0])]
        pending.append(pool.submit(infer, triton, *binary_request(images[:1], body="x")))
    *refused, good, parameter = (each.result() for each in pending)
    assert answer_of(good) == [expected]
    for answer in refused:
        assert answer.status_code == 400
        assert "an element of the tensor is JSON of several images" in answer.json()["error"]
    assert parameter.status_code == 400
    assert "unknown field 'body'" in parameter.json()["error"]


def test_a_drawn_image_is_that_of_torchserve(triton, url, images):
    expected = requests.post(url, data=images[0], headers={"Accept": "image/png"}, timeout=TIMEOUT_S)
    document, data = binary_request(images[:1], format="png")
    wanted = {**json.loads(document), "outputs": [{"name": "answer", "parameters": {"binary_data": True}}]}
    found = infer(triton, json.dumps(wanted).encode(), data)
    start = int(found.headers["Inference-Header-Content-Length"]) + 4
    assert found.content[start:] == expected.content


# ----------------------------------------------------------------------------------------------- by hand


def test_curl_sends_the_image_alone(triton, url, images, project_dir):
    expected = requests.post(url, data=images[0], timeout=TIMEOUT_S).content
    path = project_dir / f"tests/data/smears/{NAMES[0]}.jpg"
    command = ["curl", "--silent", "--fail", "--max-time", "60", "--data-binary", f"@{path}"]
    command += ["-H", "Inference-Header-Content-Length: 0", f"{triton.url}/v2/models/damoyolo/infer"]
    assert expected in subprocess.run(command, capture_output=True, check=True).stdout


def test_base64_in_json_is_read_where_a_parameter_says_so(triton, url, images):
    expected = requests.post(url, data=images[0], timeout=TIMEOUT_S).text
    text = base64.b64encode(images[0]).decode()
    inputs = [{"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [text]}]
    document = {"inputs": inputs, "parameters": {"content_type": "base64"}}
    assert answer_of(infer(triton, json.dumps(document).encode(), b"")) == [expected]
    generated = requests.post(
        f"{triton.url}/v2/models/damoyolo/generate",
        json={"image": text, "content_type": "base64"},
        timeout=TIMEOUT_S,
    )
    assert generated.json()["answer"] == expected
    document["inputs"][0]["data"] = ["not base64!"]
    answer = infer(triton, json.dumps(document).encode(), b"")
    assert answer.status_code == 400
    assert json.loads(answer.json()["error"])["message"].startswith(
        "image is 'not base64!'; base64 is accepted"
    )


@pytest.mark.parametrize(
    ("change", "status", "mentions"),
    [
        (lambda document, data: (document, data[:-1]), 400, "expecting 1 additional bytes"),
        (lambda document, data: (document.replace(b"[1, 1]", b"[1]"), data), 400, "shape"),
        (lambda document, data: (document.replace(b"[1, 1]", b"[2, 1]"), data), 400, "expected 2 string"),
        (lambda document, data: (document.replace(b"BYTES", b"UINT8"), data), 400, "UINT8"),
        (lambda document, data: (document, b"\xff\xff\xff\xff" + data[4:]), 400, "incomplete string"),
        (lambda document, data: (b"{", b""), 500, "parse"),
        (lambda document, data: (document.replace(b"0.5", b"[0.5]"), data), 400, "invalid type"),
        (lambda *_: binary_request([]), 400, "image"),
    ],
    ids=["too short", "no batch", "too few", "pixels", "length", "no JSON", "a list", "none"],
)
def test_what_triton_itself_refuses_harms_no_process(triton, images, change, status, mentions):
    before = [process.pid for process in triton.backend_processes()]
    answer = infer(triton, *change(*binary_request(images[:1], score_threshold=0.5)))
    assert answer.status_code == status, answer.text
    assert mentions in answer.json()["error"]
    assert [process.pid for process in triton.backend_processes()] == before
    answer_of(infer(triton, *binary_request(images[:1])))


@pytest.mark.parametrize(
    "path", ["logging", "repository/index", "systemsharedmemory/status", "trace/setting"]
)
def test_a_client_reaches_neither_shared_memory_nor_the_servers_settings(triton, path):
    for method in ("GET", "POST"):
        answer = requests.request(method, f"{triton.url}/v2/{path}", json={}, timeout=TIMEOUT_S)
        assert answer.status_code in (403, 405, 400), answer.text
        assert "restricted" in answer.text or answer.status_code == 405


# ------------------------------------------------------------------------------------------ tritonclient


@pytest.fixture(scope="module")
def plain(url, images):
    """TorchServe's ordinary answers to the images."""
    return [requests.post(url, data=image, timeout=TIMEOUT_S).json()["detections"] for image in images]


@pytest.fixture(scope="module")
def said(triton, client_python, project_dir):
    """What tests/clients/triton_server_client.py was told."""
    command = [str(client_python), str(project_dir / "tests/clients/triton_server_client.py")]
    command += [urlsplit(triton.url).netloc, triton.grpc_address, "damoyolo"]
    command += [str(project_dir / f"tests/data/smears/{name}.jpg") for name in NAMES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    print(found["client"])
    return found


def assert_near(tensors, expected):
    """Tensors hold the detections; Triton adds a dimension to those of one."""
    flat = {
        name: [value for (value,) in tensors[name]] for name in ("counts", "scores", "class_ids", "labels")
    }
    assert_tensors_hold({**flat, "boxes": tensors["boxes"]}, expected)


def test_the_server_says_what_it_is(said):
    assert said["ready"] == [True] * 3
    assert said["grpc_ready"] is True
    assert said["unknown_ready"] is False
    assert said["metadata"]["versions"] == ["1"]
    assert said["metadata"]["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1, 1]}]
    outputs = {each["name"]: each["datatype"] for each in said["metadata"]["outputs"]}
    assert outputs == {"answer": "BYTES"} | {name: datatype for name, (datatype, _) in OUTPUT_TENSORS.items()}
    config = said["config"]
    assert config["max_batch_size"] == 8
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 100_000
    assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 256


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritonclient_gets_the_same_detections(said, plain, protocol):
    found = said["predictions"][protocol]
    assert_near(found["one"], plain[:1])
    assert_near(found["several"], plain)
    assert [json.loads(text)["width"] for (text,) in found["several"]["answer"]] == [640] * 3
    assert_near(found["version"], plain[:1])
    assert set(found["subset"]) == {"labels", "counts"}
    assert set(found["answer"]) == {"answer"}
    (coco,) = json.loads(found["coco"]["answer"][0][0])[:1]
    assert set(coco) >= {"image_id", "category_id", "bbox", "score"}
    expected = [each for each in plain[0] if each["score"] > 0.6 and each["label"] == "RBC"][:3]
    assert_near(found["options"], [expected])
    assert found["texts"] == found["options"]
    assert found["nothing"]["counts"] == [[0]]
    assert found["nothing"]["boxes"] == []


def test_the_metadata_describe_the_tensors_of_the_answer(said):
    for described in said["metadata"]["outputs"]:
        values = said["predictions"]["http"]["several"][described["name"]]
        assert np.array(values).ndim == len(described["shape"])
        assert all(len(row) == described["shape"][1] for row in values)


# HTTP's and gRPC's status; the type of the detector's error, or a part of Triton's own message.
ERRORS = {
    "no image": ("400", "StatusCode.INVALID_ARGUMENT", "UnsupportedImage"),
    "corrupt": ("400", "StatusCode.INVALID_ARGUMENT", "CorruptImage"),
    "empty": ("400", "StatusCode.INVALID_ARGUMENT", "MissingImage"),
    "option": ("400", "StatusCode.INVALID_ARGUMENT", "InvalidOption"),
    "unknown option": ("400", "StatusCode.INVALID_ARGUMENT", "InvalidOption"),
    "class": ("400", "StatusCode.INVALID_ARGUMENT", "InvalidOption"),
    "pixels": ("400", "StatusCode.INVALID_ARGUMENT", "UINT8"),
    "input": ("400", "StatusCode.INVALID_ARGUMENT", "picture"),
    "output": ("400", "StatusCode.INVALID_ARGUMENT", "masks"),
    "images": ("400", "StatusCode.INVALID_ARGUMENT", "batch-size"),
    "model": ("404", "StatusCode.NOT_FOUND", "unknown"),
    "version": ("404", "StatusCode.NOT_FOUND", "7"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritonclient_is_told_what_is_wrong(said, protocol, name):
    status, message = said["errors"][protocol][name]
    http_status, grpc_status, mentions = ERRORS[name]
    assert status == (http_status if protocol == "http" else grpc_status)
    if message.startswith("{"):
        error = json.loads(message)
        assert error["type"] == mentions
        assert error["message"].startswith("inputs[0].data[1]: ") == (name == "corrupt")
    else:
        assert mentions in message


def test_concurrent_requests_share_batches_and_a_bad_one_fails_alone(said, plain):
    for index, found in enumerate(said["concurrent"]):
        if index % 6 == 5:
            assert found[0] == "400"
            assert json.loads(found[1])["type"] == "UnsupportedImage"
        else:
            assert_near(found, [plain[index % 3][: 1 + index % 4]])
    before, after = (said[name]["model_stats"][0]["batch_stats"] for name in ("before", "after"))
    runs = {each["batch_size"]: each["compute_infer"]["count"] for each in after}
    for each in before:
        runs[each["batch_size"]] -= each["compute_infer"]["count"]
    # 24 requests at once wait 100 ms for others, in batches of at most 8.
    assert sum(size * count for size, count in runs.items()) >= 20
    assert sum(count for size, count in runs.items() if size > 1) >= 2
    assert max(runs) <= 8


def test_metrics_count_requests_and_failures(triton, said):
    text = requests.get(triton.metrics_url, timeout=TIMEOUT_S).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    labels = '{model="damoyolo",version="1"}'
    assert float(values[f"nv_inference_request_success{labels}"]) >= 20
    failures = [float(value) for name, value in values.items() if "nv_inference_request_failure" in name]
    assert sum(failures) >= 1


# -------------------------------------------------------------------------------------- its life and end


def waiting(triton):
    """How many requests wait for a process of the backend."""
    text = requests.get(triton.metrics_url, timeout=TIMEOUT_S).text
    lines = [line for line in text.splitlines() if line.startswith("nv_inference_pending_request_count{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_sigterm_answers_what_was_accepted(project_dir, archive, images, tmp_path):
    with triton_server(project_dir, archive.path, tmp_path / "drain", "--workers", "2") as triton:
        assert triton.workers == "2"
        assert len(triton.backend_processes()) == 2
        with ThreadPoolExecutor(8) as pool:
            # 24 images are four batches at least, for two processes.
            pending = [pool.submit(infer, triton, *binary_request(images)) for _ in range(8)]
            wait_until(lambda: waiting(triton) >= 2, "requests waiting", 60.0)
            code = triton.stop()
            answers = [each.result() for each in pending if not each.exception()]
        assert code == 0
        # One that had not arrived is refused, at once or with the status of a server that ends.
        assert len([answer for answer in answers if answer.status_code == 200]) >= 2
        assert {answer.status_code for answer in answers} <= {200, 503}


def test_more_requests_than_may_wait_are_refused(project_dir, archive, images, tmp_path):
    settings = {**read_settings(archive.path), "batchSize": 1, "maxBatchDelay": 1, "jobQueueSize": 1}
    replaced = {SETTINGS_FILE: yaml.safe_dump(settings).encode()}
    short = copy_archive(archive.path, tmp_path / "short.mar", replaced)
    with triton_server(project_dir, short, tmp_path / "short") as triton, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: infer(triton, *binary_request(images[:1])), range(16)))
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all("maximum queue size" in answer.text for answer in answers if answer.status_code == 503)


def test_the_loss_of_a_process_ends_the_server(project_dir, archive, images, tmp_path):
    with triton_server(project_dir, archive.path, tmp_path / "lost") as triton:
        (process,) = triton.backend_processes()
        process.kill()
        assert triton.process.wait(30) == 1
        assert "the backend has lost 1 of 1 processes" in triton.printed()


def test_a_killed_command_leaves_no_process_and_no_file(project_dir, archive, tmp_path):
    with triton_server(project_dir, archive.path, tmp_path / "killed") as triton:
        (process,) = triton.backend_processes()
        repository = Path(process.cmdline()[1]).parents[2]
        assert (repository / "damoyolo/config.pbtxt").exists()
        started = triton.processes()
        triton.process.kill()
        wait_until(lambda: still_running(started) == [], "the end of its processes", 60.0)
        assert not repository.parent.exists()
        assert list(Path("/dev/shm").glob(f"{repository.parent.name}*")) == []
