"""LitServe's methods in this process: rows of requests, one answer for each, and the server's own errors."""

import asyncio
import importlib.util
import json
import pickle
import subprocess
import sys
import warnings

import pytest
from starlette.requests import Request

from lib.archive.members import BatchingSetting

from doubles.images import encode_jpeg, make_pixels
from doubles.tiny_archive import SETTINGS, write_tiny_archive

pytest.importorskip("litserve", reason="needs the package litserve (deploy/litserve/requirements.txt)")

IMAGE = encode_jpeg(make_pixels(48, 64))


@pytest.fixture(scope="module")
def module(project_dir):
    path = project_dir / "deploy/litserve/detection_api.py"
    spec = importlib.util.spec_from_file_location("detection_api", path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["detection_api"] = loaded  # its dataclass asks for it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what LitServe imports
        spec.loader.exec_module(loaded)
    yield loaded
    del sys.modules["detection_api"]


@pytest.fixture(scope="module")
def api(module, tmp_path_factory):
    """Of a small network, set up as in a worker."""
    folder = write_tiny_archive(tmp_path_factory.mktemp("archive") / "tiny")
    (folder / "MAR-INF").mkdir()
    (folder / "MAR-INF/MANIFEST.json").write_text('{"model": {"modelName": "cells"}}')
    settings = {**BatchingSetting(8, 2, 2).model_settings(), "handler": SETTINGS}
    made = module.DetectionAPI(folder, settings, workers=2, api_servers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.set_num_threads", lambda _: None)
        patch.setattr("damoyolo.worker_log.protect_log", lambda: None)
        patch.setattr("logging.Logger.setLevel", lambda *_: None)
        made.setup("cpu")
    yield made
    made.service.close()


def read(module, body=b"", query="", **headers):
    """The row of a request."""
    sent = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        return sent.pop()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    return asyncio.run(module.read_row(Request(scope, receive)))


def test_the_body_is_the_image_and_the_query_string_has_the_options(module):
    row = read(
        module, b"image", "score_threshold=0.5&max_detections=1&max_detections=2", content_type="image/jpeg"
    )
    assert row.fields == {"body": b"image"}
    # As in a form the last value counts.
    assert row.headers == {
        "content-type": "image/jpeg",
        "x-detect-score-threshold": "0.5",
        "x-detect-max-detections": "2",
    }


def test_a_form_has_fields_and_the_types_of_its_files(module):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="data"; filename="a.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\nimage\r\n"
        b'--x\r\nContent-Disposition: form-data; name="score_threshold"\r\n\r\n0.5\r\n--x--\r\n'
    )
    row = read(module, body, content_type="multipart/form-data; boundary=x")
    assert row.fields == {"data": b"image", "score_threshold": b"0.5"}
    assert row.headers["data"] == {"content-type": "image/jpeg"}


def test_a_bad_request_costs_only_its_own_answer(module, api):
    rows = [
        read(module, IMAGE),
        read(module, b"no image"),
        read(module, IMAGE, "score_threshold=2"),
        read(module, IMAGE, "format=yolo&score_threshold=1"),
        read(module, IMAGE),
    ]
    # What travels between LitServe's processes.
    answers = pickle.loads(pickle.dumps([api.encode_response(each) for each in api.predict(rows)]))
    assert [answer.status_code for answer in answers] == [200, 415, 400, 200, 200]
    assert answers[0].body == answers[4].body
    assert json.loads(answers[0].body)["width"] == 64
    assert json.loads(answers[1].body)["type"] == "UnsupportedImage"
    assert json.loads(answers[2].body)["type"] == "InvalidOption"
    assert answers[3].headers["content-type"] == "text/plain"


def test_without_batches_litserve_hands_over_one_row(module, api):
    row = read(module, IMAGE)
    assert api.predict(row).body == api.predict([row])[0].body


def test_the_answers_are_those_of_the_service(module, api):
    row = read(module, IMAGE, "score_threshold=0.01")
    (answer,) = api.service.answer([{"body": IMAGE, "score_threshold": "0.01"}], [{}])
    assert api.predict([row])[0].body == answer.body


def test_a_worker_that_lost_its_device_answers_its_requests_and_ends(module, api, monkeypatch):
    from damoyolo.errors import DeviceLostError

    ends = []

    class Timer:
        def __init__(self, seconds, *what):
            ends.append(what)

        def start(self):
            pass

    def fail(*_):
        raise DeviceLostError("gone")

    monkeypatch.setattr(api.service, "answer", fail)
    monkeypatch.setattr(module.threading, "Timer", Timer)
    answers = api.predict([read(module, IMAGE)] * 2)
    assert [api.encode_response(answer).status_code for answer in answers] == [500, 500]
    assert ends == [(module.os._exit, (1,))]


async def call(app):
    """Status and JSON of an ASGI application's answer."""
    sent = []

    async def send(message):
        sent.append(message)

    await app({"type": "http", "method": "POST", "headers": []}, None, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


async def never(*_):
    await asyncio.sleep(60)


def test_more_requests_than_may_wait_are_refused(module, api):
    async def call_four():
        app = module.Limits(never, 3, 0.2)
        answers = await asyncio.gather(*(call(app) for _ in range(4)))
        return [*answers, await call(app)]

    answers = asyncio.run(call_four())
    # Those that were given up do not count any longer.
    assert [status for status, _ in answers] == [504, 504, 504, 503, 504]
    assert answers[3][1]["type"] == "ServiceUnavailable"
    assert "3 requests are waiting" in answers[3][1]["message"]
    assert api.most_waiting == 128  # half of jobQueueSize for each of two processes


def test_a_request_whose_worker_was_killed_is_answered_in_time(module):
    status, error = asyncio.run(call(module.Limits(never, 3, 0.05)))
    assert (status, error["type"]) == (504, "GatewayTimeout")
    assert "0.05 s" in error["message"]


def test_the_help_of_the_command_needs_neither_litserve_nor_torch(project_dir):
    code = (
        "import sys, runpy\nsys.argv = ['serve.py', '--help']\n"
        "try:\n    runpy.run_path('deploy/litserve/serve.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'litserve', 'fastapi'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project_dir, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Prints LitServe's log" in done.stdout


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--archive", "missing.mar"], "cannot read the archive missing.mar"),
        (["--port", "80"], "accepted is a port from 1024 to 65535"),
        (["--workers", "0"], "'0' given"),
    ],
)
def test_a_wrong_option_is_refused_at_once(project_dir, options, complaint):
    done = subprocess.run(
        [sys.executable, "deploy/litserve/serve.py", *options],
        cwd=project_dir,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert complaint in done.stderr
