"""The same archive behind a real LitServe: TorchServe's answers, LitServe's health, faults and end."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
import requests

from lib.server.local_http import answers_ok
from lib.server.process import free_ports

from doubles.answers import PRECISION
from doubles.real_server import wait_until
from doubles.served_command import still_running

pytest.importorskip("litserve", reason="needs the package litserve (deploy/litserve/requirements.txt)")

TIMEOUT_S = 60.0
PLAIN = {"Accept-Encoding": "identity"}


@contextmanager
def litserve(project_dir, archive, folder, *options):
    """deploy/litserve/serve.py with the archive: its address, and its process."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    output = folder / "output.txt"
    command = [
        sys.executable,
        "deploy/litserve/serve.py",
        "--archive",
        str(archive.path),
        "--port",
        str(port),
    ]
    with output.open("w") as file:
        process = subprocess.Popen(
            [*command, *options], cwd=project_dir, stdout=file, stderr=subprocess.STDOUT
        )
    children = []
    try:
        wait_until(lambda: is_ready(url, process, output), "LitServe being ready")
        children = psutil.Process(process.pid).children(recursive=True)
        yield url, process
    finally:
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0, output.read_text()
        # multiprocessing's resource tracker ends after the others.
        wait_until(lambda: not still_running(children), "the end of its processes", 10.0)


def is_ready(url, process, output):
    assert process.poll() is None, output.read_text()
    return answers_ok(f"{url}/health")


@pytest.fixture(scope="module")
def served(project_dir, archive, tmp_path_factory):
    with litserve(project_dir, archive, tmp_path_factory.mktemp("litserve")) as (url, _):
        yield f"{url}/predict"


def same(url, served, **request):
    """Both servers' answers to a request, which have to be the same."""
    request = {"timeout": TIMEOUT_S, "headers": PLAIN, **request}
    theirs, ours = (requests.post(each, **request) for each in (url, served))
    assert (ours.status_code, ours.content) == (theirs.status_code, theirs.content)
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    return ours


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"score_threshold": "0.8"},
        {"classes": "WBC", "max_detections": "1"},
        {"format": "coco", "image_id": "7"},
        {"format": "yolo"},
        {"format": "jpeg"},
        {"score_threshold": "2"},
        {"format": "bmp"},
        {"score_treshold": "0.5"},
    ],
)
def test_an_image_as_the_body_has_torchserves_answer_byte_for_byte(url, served, smear, params):
    same(url, served, data=smear, params=params)


@pytest.mark.parametrize(
    "request_of",
    [
        lambda smear: {"files": {"data": smear}, "data": {"score_threshold": "0.8"}},
        lambda smear: {"files": {"file": smear}},
        lambda smear: {"json": {"image": "no base64"}},
        lambda smear: {"json": {"instances": []}},
        lambda smear: {"data": smear[:2000]},
        lambda smear: {"data": b"no image"},
        lambda smear: {"data": smear, "headers": {**PLAIN, "X-Detect-Score-Threshold": "0.8"}},
        lambda smear: {"data": smear, "headers": {**PLAIN, "Accept": "image/png"}},
    ],
)
def test_other_forms_of_requests_have_the_same_answer_too(url, served, smear, request_of):
    same(url, served, **request_of(smear))


def test_a_bad_image_in_a_batch_costs_only_its_own_request(url, served, smears):
    if PRECISION != "fp32":
        pytest.skip("an answer may depend on the batch")
    bodies = [image for image, _ in smears.values()] + [b"no image", b"\xff\xd8\xff\xe0 broken"]
    expected = [requests.post(url, body, timeout=TIMEOUT_S, headers=PLAIN) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        # The archive waits 100 ms for a batch.
        found = list(pool.map(lambda body: requests.post(served, body, timeout=TIMEOUT_S), bodies * 2))
    assert [(each.status_code, each.content) for each in found] == [
        (each.status_code, each.content) for each in expected
    ] * 2


def test_errors_of_the_server_itself_have_the_same_form(served):
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    long, files = {"classes": "x" * 1_100_000}, {"data": b"image"}
    for answer, status, kind in (
        (requests.get(served, timeout=TIMEOUT_S), 405, "MethodNotAllowed"),
        (requests.post(f"{served}s", b"", timeout=TIMEOUT_S), 404, "NotFound"),
        (requests.post(served, b"no form", headers=form, timeout=TIMEOUT_S), 400, "BadRequest"),
        (requests.post(served, data=long, files=files, timeout=TIMEOUT_S), 400, "BadRequest"),
    ):
        assert (answer.status_code, answer.json()["code"], answer.json()["type"]) == (status, status, kind)


def test_a_body_larger_than_torchserve_takes_is_refused(served):
    answer = requests.post(served, bytes(34_000_001), timeout=TIMEOUT_S)
    assert (answer.status_code, answer.json()["code"]) == (413, 413)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_end_answers_what_was_accepted(
    project_dir, archive, smear, tmp_path
):
    # The worker takes requests at once, and waits for 3 s for more.
    options = ("--workers", "1", "--api-servers", "1", "--timeout", "8")
    options += ("--batch-size", "16", "--max-batch-delay", "3000")

    def post():
        return requests.post(f"{url}/predict", smear, timeout=TIMEOUT_S)

    with litserve(project_dir, archive, tmp_path, *options) as (url, process), ThreadPoolExecutor(8) as pool:
        lost = pool.submit(post)
        wait_until(lambda: clients(url), "the request being sent")
        time.sleep(1.0)
        worker_of(process).kill()
        # Twice the time-out; LitServe alone would never answer.
        assert lost.result().status_code == 504
        wait_until(lambda: post().status_code == 200, "the new worker's answers")
        worker = worker_of(process)
        worker.suspend()
        before = clients(url)  # the server closes an idle connection after 5 s
        answers = [pool.submit(post) for _ in range(8)]
        wait_until(lambda: len(clients(url) - before) == 8, "the requests being sent")
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert not any(each.done() for each in answers)
        worker.resume()
        assert {each.result().status_code for each in answers} == {200}


def worker_of(process):
    """The process that has the network."""
    return max(psutil.Process(process.pid).children(), key=lambda each: each.memory_info().rss)


def clients(url):
    """The addresses of those that are connected to the server."""
    port = int(url.rpartition(":")[2])
    found = psutil.net_connections("tcp")
    return {each.raddr for each in found if each.status == "ESTABLISHED" and each.laddr.port == port}
