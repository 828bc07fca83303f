"""The Open Inference Protocol v2 and KServe v1, by clients of Triton and KServe, alone and in batches."""

import base64
import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from damoyolo.inference_answer import OUTPUT_TENSORS
from doubles.answers import assert_tensors_hold
from doubles.real_server import echo_server, wait_until

TIMEOUT_S = 120.0
CLIENT_S = 240.0
NAMES = ("smear_3", "smear_4", "smear_7")


@pytest.fixture(scope="module")
def images(smears):
    return [smears[name][0] for name in NAMES]


@pytest.fixture(scope="module")
def plain(url, images):
    """The ordinary answers to the images."""
    answers = [requests.post(url, data=image, timeout=TIMEOUT_S) for image in images]
    assert {answer.status_code for answer in answers} == {200}
    return [answer.json()["detections"] for answer in answers]


@pytest.fixture(scope="module")
def image_paths(project_dir):
    return [str(project_dir / f"tests/data/smears/{name}.jpg") for name in NAMES]


@pytest.fixture(scope="module")
def run_client(project_dir, client_python, image_paths):
    def run(script, address):
        command = [str(client_python), str(project_dir / "tests/clients" / script), address, "damoyolo"]
        done = subprocess.run([*command, *image_paths], capture_output=True, text=True, timeout=CLIENT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        print(found["client"])
        return found

    return run


@pytest.fixture(scope="module")
def triton(run_client, server):
    return run_client("triton_client.py", urlsplit(server.inference_url).netloc)


@pytest.fixture(scope="module")
def kserve(run_client, server):
    return run_client("kserve_client.py", server.inference_url)


def assert_same(tensors, expected, most=None):
    """Tensors hold the detections of the ordinary answers, image by image."""
    assert_tensors_hold(tensors, expected if most is None else [found[:most] for found in expected])


# ----------------------------------------------------------------------------------------- tritonclient


def test_tritonclient_learns_what_the_server_is(triton):
    said = triton["questions"]
    assert [said[name] for name in ("live", "ready", "model_ready", "version_ready")] == [True] * 4
    assert [said[name] for name in ("unknown_ready", "unknown_version_ready")] == [False] * 2
    assert said["server"]["extensions"] == ["binary_tensor_data", "model_configuration"]
    assert said["model"] == said["version"]
    assert (said["model"]["name"], said["model"]["versions"]) == ("damoyolo", ["1.0"])
    assert said["unknown"] == ["404", "Model not found: unknown"]
    assert said["unknown_version"][0] == "404"


def test_the_metadata_describe_the_tensors_of_the_answer(triton, server, images):
    metadata = triton["questions"]["model"]
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    datatypes = {output["name"]: output["datatype"] for output in metadata["outputs"]}
    assert list(datatypes.items()) == [(name, datatype) for name, (datatype, _) in OUTPUT_TENSORS.items()]
    config = triton["questions"]["config"]
    assert config["input"] == [{"name": "image", "data_type": "TYPE_STRING", "dims": [-1]}]
    types = [output["data_type"] for output in config["output"]]
    assert types == ["TYPE_INT64", "TYPE_FP32", "TYPE_FP32", "TYPE_INT64", "TYPE_STRING"]
    assert config["max_batch_size"] == 0
    answer = infer(server, document(images)).json()
    for described, sent in zip(metadata["outputs"], answer["outputs"], strict=True):
        assert described["datatype"] == sent["datatype"]
        assert len(described["shape"]) == len(sent["shape"])
        assert all(size in (-1, own) for size, own in zip(described["shape"], sent["shape"], strict=True))


@pytest.mark.parametrize("form", ["json", "binary", "column"])
def test_tritonclient_gets_the_numbers_of_the_ordinary_answer(triton, plain, form):
    assert_same(triton["predictions"][form], plain)
    assert triton["predictions"]["binary"]["id"] == "a b"


def test_tritonclient_gets_the_outputs_that_it_asks_for(triton, plain):
    mixed = triton["predictions"]["mixed"]
    assert set(mixed) == {"id", "labels", "counts"}
    assert mixed["counts"] == [len(plain[0])]
    assert sorted(mixed["labels"]) == sorted(found["label"] for found in plain[0])


def test_parameters_of_tritonclient_are_options(triton, plain):
    found = [each for each in plain[0] if each["label"] == "RBC" and each["score"] > 0.6]
    assert_same(triton["predictions"]["options"], [found], most=3)
    for name in ("version", "sequence"):
        assert_same(triton["predictions"][name], plain[:1])


def test_concurrent_requests_of_tritonclient_keep_their_images_and_options(triton, plain):
    for index, tensors in enumerate(triton["concurrent"]):
        assert tensors["id"] == str(index)
        assert_same(tensors, plain[: 1 + index % 2], most=1 + index % 5)


@pytest.mark.parametrize(
    ("name", "status", "mentions"),
    [
        ("corrupt", "422", "inputs[0].data[1]: "),
        ("no image", "415", "image_formats"),
        ("pixels", "400", "BYTES"),
        ("option", "400", "from 0 to 1"),
        ("unknown option", "400", "'treshold'"),
        ("output", "400", "'masks'"),
        ("classification", "400", "'classification'"),
        ("unknown model", "404", "unknown"),
        ("unknown version", "404", "7.0"),
        ("gzip", "400", "Content-Encoding"),
    ],
)
def test_tritonclient_is_told_what_is_wrong(triton, name, status, mentions):
    found_status, message = triton["errors"][name]
    assert found_status == status
    assert mentions in message


# ----------------------------------------------------------------------------------------------- kserve


def test_kserve_v2_gets_the_numbers_of_the_ordinary_answer(kserve, plain):
    said = kserve["v2"]
    assert [said[name] for name in ("live", "ready", "model_ready", "unknown_ready")] == [
        True,
        True,
        True,
        False,
    ]
    assert_same(said["json"], plain)
    assert_same(said["binary"], plain)
    assert (said["json"]["id"], said["json"]["model_name"]) == ("x", "damoyolo")
    assert set(said["subset"]) == {"id", "model_name", "labels", "counts"}
    assert_same(said["options"], [[each for each in plain[0] if each["score"] > 0.6]], most=3)
    for index, tensors in enumerate(said["concurrent"]):
        assert_same(tensors, plain[: 1 + index % 2])


def test_kserve_v1_gets_the_ordinary_answers(kserve, plain):
    said = kserve["v1"]
    assert said["model_ready"] is True
    for form in ("instances", "image", "data"):
        assert [answer["detections"] for answer in said[form]["predictions"]] == plain
    for form in ("single", "torchserve"):
        assert said[form]["detections"] == plain[0]
    (answer,) = said["options"]["predictions"]
    assert answer["detections"] == [each for each in plain[0] if each["score"] > 0.6][:3]


@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_kserve_is_told_what_is_wrong(kserve, protocol):
    status, body, message = kserve[protocol]["corrupt"]
    assert status == 422
    assert set(body) == {"error"}
    assert message.startswith(("instances[0]: ", "inputs[0].data[0]: "))
    status, body, _ = kserve[protocol]["unknown"]
    assert (status, body) == (404, {"error": "Model not found: unknown"})
    if protocol == "v1":
        assert kserve["v1"]["unknown_ready"][0] == 404


# --------------------------------------------------------------------------------------------------- by hand


def document(images, **more):
    data = [base64.b64encode(image).decode() for image in images]
    return {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": data}], **more}


def infer(server, content, path="damoyolo/infer", **options):
    return requests.post(
        f"{server.inference_url}/v2/models/{path}", json=content, timeout=TIMEOUT_S, **options
    )


def tensors_of(answer):
    """The values of an answer in JSON."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    values = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    return {**values, "boxes": np.reshape(values["boxes"], (-1, 4)).tolist()}


def with_binary_data(server, images):
    """As perf_analyzer sends images."""
    binary = b"".join(struct.pack("<I", len(image)) + image for image in images)
    tensor = {"name": "image", "shape": [len(images)], "datatype": "BYTES"}
    tensor["parameters"] = {"binary_data_size": len(binary)}
    head = json.dumps(
        {"inputs": [tensor], "outputs": [{"name": "counts", "parameters": {"binary_data": True}}]}
    )
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    address = f"{server.inference_url}/v2/models/damoyolo/infer"
    return requests.post(address, data=head.encode() + binary, headers=headers, timeout=TIMEOUT_S)


def test_the_answer_names_model_version_and_request(server, images, plain):
    for path in ("damoyolo/infer", "damoyolo/versions/1.0/infer"):
        answer = infer(server, document(images, id="abc"), path)
        assert_same(tensors_of(answer), plain)
        assert [answer.json()[name] for name in ("model_name", "model_version", "id")] == [
            "damoyolo",
            "1.0",
            "abc",
        ]


def test_binary_data_come_with_the_length_of_the_json_part(server, images, plain):
    answer = with_binary_data(server, images)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/octet-stream"
    length = int(answer.headers["Inference-Header-Content-Length"])
    (output,) = json.loads(answer.content[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 8 * len(images)}
    assert np.frombuffer(answer.content[length:], "<i8").tolist() == [len(found) for found in plain]


def batch_counters(server):
    """How many requests and batches the workers have had."""
    page = requests.get(f"{server.metrics_url}/metrics", timeout=TIMEOUT_S).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return [
        sum(sample.value for sample in samples if sample.name == f"damoyolo_batch_size_{part}")
        for part in ("sum", "count")
    ]


def test_protocols_share_batches_and_each_request_gets_its_own_answer(server, url, images, plain):
    """Requests of every form at once, some of which fail; batches hold two of them or more on average."""
    time.sleep(2.0)  # a worker sends its counters once a second
    requests_before, batches_before = batch_counters(server)
    corrupt = images[0][:200]
    v1 = f"{server.inference_url}/v1/models/damoyolo:predict"

    def post(index):
        image = images[index % 3]
        form = index % 6
        if form == 0:
            return requests.post(url, data=image, timeout=TIMEOUT_S)
        if form == 1:
            return infer(server, document(images[:2], id=str(index)))
        if form == 2:
            return with_binary_data(server, images[:2])
        if form == 3:
            body = {"instances": [{"b64": base64.b64encode(image).decode()}]}
            return requests.post(v1, json=body, timeout=TIMEOUT_S)
        if form == 4:
            return infer(server, document([image, corrupt]))
        return requests.post(url, data=image, headers={"Accept": "image/jpeg"}, timeout=TIMEOUT_S)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(post, range(48)))
    for index, answer in enumerate(answers):
        form, expected = index % 6, plain[index % 3]
        if form == 0:
            assert answer.json()["detections"] == expected
        elif form == 1:
            assert answer.json()["id"] == str(index)
            assert_same(tensors_of(answer), plain[:2])
        elif form == 2:
            counts = answer.content[int(answer.headers["Inference-Header-Content-Length"]) :]
            assert np.frombuffer(counts, "<i8").tolist() == [len(found) for found in plain[:2]]
        elif form == 3:
            assert answer.json()["predictions"][0]["detections"] == expected
        elif form == 4:
            assert answer.status_code == 422
            assert answer.json()["error"].startswith("inputs[0].data[1]: ")
        else:
            assert answer.headers["Content-Type"] == "image/jpeg"
    wait_until(lambda: batch_counters(server)[0] >= requests_before + len(answers), "the counters", 10.0)
    batches = batch_counters(server)[1] - batches_before
    print(f"{len(answers)} requests in {batches:.0f} batches")
    assert batches <= len(answers) / 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/damoyolo/infer", 405),
        ("PUT", "/v2/models/damoyolo/versions/1.0/infer", 405),
        ("POST", "/v2/models/damoyolo", 405),
        ("POST", "/v2", 405),
        ("DELETE", "/v1/models/damoyolo", 405),
        ("DELETE", "/v1/models/damoyolo:predict", 405),
        ("GET", "/v1/models/damoyolo:predict", 405),
        ("GET", "/v2/models/unknown", 404),
        ("GET", "/v2/models/damoyolo/versions/7", 404),
        ("GET", "/v2/models/unknown/ready", 404),
        ("GET", "/v1/models/unknown", 404),
        ("POST", "/v2/models/unknown/infer", 404),
        ("POST", "/v2/models/damoyolo/versions/7/infer", 404),
        ("POST", "/v2/models//infer", 404),
        ("GET", "/v2/nothing/here", 404),
        ("POST", "/v2/models/damoyolo/infer/more", 404),
        ("POST", "/v1/models/unknown:predict", 404),
    ],
)
def test_other_methods_and_addresses_are_refused_in_the_protocols_form(server, method, path, status):
    answer = requests.request(method, server.inference_url + path, timeout=TIMEOUT_S)
    assert answer.status_code == status
    assert error_of(answer)


@pytest.mark.parametrize(
    ("head", "status", "fields"),
    [
        (b"POST /v2/models/damoyolo/infer", 417, {"error"}),
        (b"POST /predictions/damoyolo", 417, {"code", "type", "message"}),
        # requests would send other addresses than these.
        (b"POST /%76%32/models/unknown/infer", 404, {"error"}),
        (b"POST /v2/models/%zz/infer", 400, {"error"}),
        # An address that was not read to its end is not known.
        (b"POST /v2/models/" + b"a" * 4200 + b"/infer", 400, {"code", "type", "message"}),
    ],
)
def test_errors_have_the_form_of_their_address_as_it_is_on_the_wire(server, head, status, fields):
    expect = b"Expect: nonsense\r\n" if status == 417 else b""
    address = urlsplit(server.inference_url)
    with socket.create_connection((address.hostname, address.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(head + b" HTTP/1.1\r\nHost: x\r\n" + expect + b"Content-Length: 3\r\n\r\nabc")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        body = answer.read()
    assert (answer.status, set(json.loads(body))) == (status, fields)


@pytest.mark.parametrize(("expect", "length"), [("nonsense", 100), ("100-continue", 40_000_000)])
def test_a_body_after_a_refused_expectation_is_no_request(server, expect, length):
    """Netty would read it as one, which a proxy has not seen."""
    address = urlsplit(server.inference_url)
    head = f"POST /v2/models/damoyolo/infer HTTP/1.1\r\nHost: x\r\nExpect: {expect}\r\n"
    hidden = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + hidden)
        received = connection.recv(65536)
        connection.sendall(hidden)
        while part := connection.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 ") == 1
    assert received[9:12] == (b"417" if expect == "nonsense" else b"413")
    assert b"connection: close" in received.lower()


def test_the_port_for_management_has_no_predictions(server):
    for method in ("GET", "POST"):
        address = f"{server.management_url}/v2/models/damoyolo/infer"
        assert requests.request(method, address, timeout=TIMEOUT_S).status_code == 404


def test_the_root_is_still_torchserves(server):
    assert requests.options(f"{server.inference_url}/", timeout=TIMEOUT_S).status_code == 200
    for method in ("GET", "POST"):
        answer = requests.request(method, f"{server.inference_url}/", timeout=TIMEOUT_S)
        assert answer.status_code in (404, 405)
        assert set(answer.json()) == {"code", "type", "message"}


def test_models_and_readiness_have_the_addresses_of_both_protocols(server):
    expected = {
        "/v2/models": {"models": ["damoyolo"]},
        "/v1/models": {"models": ["damoyolo"]},
        "/v1/models/damoyolo": {"name": "damoyolo", "ready": True},
        "/v2/models/damoyolo/ready": {"name": "damoyolo", "ready": True},
        "/v2/models/damoyolo/versions/1.0/ready": {"name": "damoyolo", "ready": True},
    }
    for path, body in expected.items():
        answer = requests.get(server.inference_url + path, timeout=TIMEOUT_S)
        assert (answer.status_code, answer.json()) == (200, body)
        assert requests.head(server.inference_url + path, timeout=TIMEOUT_S).status_code == 200


def test_options_are_accepted_as_query_and_header_too(server, images, plain):
    expected = [[each for each in plain[0] if each["score"] > 0.6]]
    by_query = infer(server, document(images[:1]), "damoyolo/infer?score_threshold=0.6")
    by_header = infer(server, document(images[:1]), headers={"X-Detect-Score-Threshold": "0.6"})
    for answer in (by_query, by_header):
        assert_same(tensors_of(answer), expected)


@pytest.mark.parametrize("form", ["picture", "form", "multipart"])
def test_other_bodies_are_refused_at_the_address_of_the_protocol(server, images, form):
    address = f"{server.inference_url}/v2/models/damoyolo/infer"
    options = {
        "picture": {"data": images[0]},
        "form": {"data": {"a": "1"}},
        "multipart": {"files": {"data": images[0]}},
    }[form]
    answer = requests.post(address, timeout=TIMEOUT_S, **options)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}


def test_a_body_over_the_limit_is_refused_in_the_protocols_form(server):
    address = f"{server.inference_url}/v2/models/damoyolo/infer"
    answer = requests.post(
        address, data=bytes(35_000_000), headers={"Expect": "100-continue"}, timeout=TIMEOUT_S
    )
    assert answer.status_code == 413
    assert "max_request_size" in answer.json()["error"]


def test_errors_at_the_ordinary_address_keep_their_form(url):
    answer = requests.post(url, data=b"no image", timeout=TIMEOUT_S)
    assert set(answer.json()) == {"code", "type", "message"}


# ------------------------------------------------------------------------------- the examples of the document


def test_the_examples_of_the_document_run(server, project_dir, client_python, tmp_path):
    text = (project_dir / "docs/protocols.md").read_text()
    text = text.replace("127.0.0.1:8080", urlsplit(server.inference_url).netloc)
    text = text.replace("tests/data", f"{project_dir}/tests/data")
    blocks = re.findall(r"(?ms)^```(bash|python)\n(.*?)^```$", text)
    shell = "\n".join(block for language, block in blocks if language == "bash")
    programs = [["bash", "-euc", shell]]
    programs += [[str(client_python), "-c", block] for language, block in blocks if language == "python"]
    assert len(programs) == 3
    printed = []
    for program in programs:
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=CLIENT_S)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert '"outputs":[{"name":"counts"' in printed[0]
    assert '{"predictions":[{"width":640' in printed[0]
    assert "'id': '1'" in printed[1]
    assert len(printed[2].splitlines()) >= 2


# ------------------------------------------------------------------------------------ errors of the front end


def test_errors_of_the_front_end_have_the_protocols_form_too(project_dir, tmp_path):
    """A full queue, an answer that takes too long, a worker that is given up, and a server that ends."""
    model = {"batchSize": 1, "jobQueueSize": 1, "maxRetryTimeoutInSec": 0, "responseTimeout": 30}
    limits = {"front_end_answer_timeout_s": 3, "front_end_drain_grace_s": 20}
    with echo_server(project_dir, tmp_path, model, **limits) as echo:
        addresses = [
            f"{echo.inference_url}/v2/models/echo{version}/infer" for version in ("", "/versions/1.0")
        ]

        def ask(index, sleep_s):
            address = addresses[index % 2]
            return requests.post(address, data={"sleep": str(sleep_s)}, timeout=TIMEOUT_S)

        assert ask(0, 0).json()["headers"]["x-inference-protocol"] == "v2"
        about = requests.get(f"{echo.inference_url}/v2/models/echo", timeout=TIMEOUT_S).json()
        assert (about["inputs"], about["outputs"]) == ([], [])  # of another handler nothing is known
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda index: ask(index, 1), range(8)))
            assert {answer.status_code for answer in answers} == {200, 503}
            refused = next(answer for answer in answers if answer.status_code == 503)
            assert int(refused.headers["Retry-After"]) > 0
            assert "jobQueueSize" in error_of(refused)
            late = ask(1, 5)
            assert (late.status_code, "front_end_answer_timeout_s" in error_of(late)) == (504, True)
            wait_until(lambda: ask(0, 0).status_code == 200, "the worker being free", 30.0)

            slow = pool.submit(ask, 0, 2.5)
            time.sleep(0.5)
            echo.java.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            refused = ask(1, 0)
            assert (refused.status_code, error_of(refused)) == (503, "The server is about to end.")
            for path in ("/v2/models/echo/ready", "/v2/models/echo/versions/1.0/ready", "/v1/models/echo"):
                answer = requests.get(echo.inference_url + path, timeout=TIMEOUT_S)
                reason = {"name": "echo", "ready": False, "reason": "the server is about to end"}
                assert (answer.status_code, answer.json()) == (503, reason)
            assert slow.result().status_code == 200
        echo.java.wait(60.0)


def test_a_model_without_workers_is_not_ready_in_either_protocol(project_dir, tmp_path):
    with echo_server(project_dir, tmp_path) as echo:
        paths = ["/v2/models/echo/ready", "/v2/models/echo/versions/1.0/ready", "/v1/models/echo"]
        for path in paths:
            assert requests.get(echo.inference_url + path, timeout=TIMEOUT_S).json()["ready"] is True
        scale = {"min_worker": 0, "max_worker": 0, "synchronous": "true"}
        requests.put(f"{echo.management_url}/models/echo", params=scale, timeout=TIMEOUT_S)
        for path in paths:
            answer = requests.get(echo.inference_url + path, timeout=TIMEOUT_S)
            assert answer.status_code == 503
            assert answer.json() == {
                "name": "echo",
                "ready": False,
                "reason": "0 of 1 workers have loaded the model",
            }
        answer = requests.post(
            f"{echo.inference_url}/v2/models/echo/infer", data={"sleep": "0"}, timeout=TIMEOUT_S
        )
        assert answer.status_code == 503
        assert "has no worker" in error_of(answer)


def error_of(answer):
    """The text of an error in the protocol's form."""
    assert set(answer.json()) == {"error"}
    return answer.json()["error"]
