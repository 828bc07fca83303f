"""LitServe's methods in this process: rows of requests, one answer for each, and the server's own errors."""

import asyncio
import importlib.util
import json
import pickle
import subprocess
import sys
import warnings
import zipfile

import pytest
from starlette.requests import Request

from lib.archive.members import BatchingSetting
from lib.cli import ScriptError

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
    made = module.DetectionAPI(folder, settings, api_servers=2)
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


async def call(app, receive=None):
    """Status and JSON of an ASGI application's answer, which begins once."""
    sent = []

    async def send(message):
        sent.append(message)

    async def whole_body():
        return {"type": "http.request", "body": b"", "more_body": False}

    await app({"type": "http", "method": "POST", "headers": []}, receive or whole_body, send)
    (start,) = (message for message in sent if message["type"] == "http.response.start")
    return start["status"], json.loads(b"".join(message.get("body", b"") for message in sent) or "null")


async def never(_scope, receive, _send):
    """An application that reads the body and does not answer."""
    while (await receive())["more_body"]:
        pass
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
    assert "3 requests wait" in answers[3][1]["message"]
    # jobQueueSize, and what two workers compute in batches of 8, for two processes.
    assert api.most_waiting == (256 + 2 * 8) / 2


def test_a_request_waits_from_the_end_of_its_body_to_the_start_of_its_answer(module):
    """Slow clients take nobody's place, neither while they send nor while they read."""

    async def answers(_scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.3)
        await send({"type": "http.response.body", "body": b"1"})

    async def run():
        app = module.Limits(answers, 1, 0.1)
        parts = [{"type": "http.request", "body": b"", "more_body": more} for more in (False, True)]

        async def slow_body():
            await asyncio.sleep(0.15)
            return parts.pop()

        # Its body takes longer than a request may wait, and ends while the answer to the other is being sent.
        slow = asyncio.ensure_future(call(app, slow_body))
        await asyncio.sleep(0.1)
        quick = await call(app)
        return quick, await slow

    assert asyncio.run(run()) == ((200, 1), (200, 1))


def test_whoever_finds_the_places_taken_at_the_end_of_the_body_is_refused(module):
    async def run():
        limits = module.Limits(never, 1, 0.3)
        begun = asyncio.Event()

        async def late_body():
            begun.set()
            await asyncio.sleep(0.1)
            return {"type": "http.request", "body": b"", "more_body": False}

        late = asyncio.ensure_future(call(limits, late_body))
        await begun.wait()
        first = asyncio.ensure_future(call(limits))
        with pytest.raises(module.HTTPException) as refusal:  # which LitServe's application answers
            await late
        assert refusal.value.status_code == 503
        return await first

    assert asyncio.run(run())[0] == 504


def test_a_request_whose_worker_was_killed_is_answered_in_time(module):
    status, error = asyncio.run(call(module.Limits(never, 3, 0.05)))
    assert (status, error["type"]) == (504, "GatewayTimeout")
    assert "0.05 s" in error["message"]


def test_an_answer_that_nobody_waits_for_any_longer_is_not_kept(module):
    async def run():
        kept = module.OpenAnswers()

        async def wait(key):
            kept[key] = key
            await asyncio.sleep(60)

        given_up = asyncio.ensure_future(wait("a"))
        waits = asyncio.ensure_future(wait("b"))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        await asyncio.sleep(0)
        found = dict(kept)
        waits.cancel()
        return found

    assert asyncio.run(run()) == {"b": "b"}


@pytest.fixture
def command(project_dir, monkeypatch):
    """deploy/litserve/serve.py as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("litserve_serve", project_dir / "deploy/litserve/serve.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize(
    ("options", "found", "expected"),
    [
        ([], 0, 0),
        ([], 2, 2),
        (["--devices", "1"], 2, 1),
        (["--device", "cpu"], 2, 0),
        (["--devices", "4"], 2, "--devices is 4, but CUDA finds 2 GPU"),
        (["--devices", "1"], 0, "--devices is 1, but CUDA finds 0 GPU"),
        (["--devices", "1", "--device", "cpu"], 2, "--devices is 1, but --device is cpu"),
        (["--device", "cuda"], 0, "--device is cuda, but CUDA finds no GPU"),
    ],
)
def test_the_gpus_that_are_asked_for_are_taken_or_refused(command, monkeypatch, options, found, expected):
    monkeypatch.setattr("lib.server.gpus.count_gpus", lambda: found)
    arguments = command._parser().parse_args(options)
    if isinstance(expected, int):
        assert command._gpus(arguments) == expected
    else:
        with pytest.raises(ScriptError, match=expected):
            command._gpus(arguments)


@pytest.fixture
def written(tmp_path):
    """Writes an archive with settings, and without some of its files."""

    def write(left_out=(), **settings):
        members = {
            "MAR-INF/MANIFEST.json": '{"model": {"modelName": "cells", "handler": "handler.py"}}',
            "model-config.yaml": json.dumps(
                {"batchSize": 8, "maxBatchDelay": 2, "minWorkers": 2, **settings}
            ),
            "handler.py": "",
            "damoyolo/opening.py": "",
        }
        with zipfile.ZipFile(tmp_path / "cells.mar", "w") as archive:
            for name in set(members) - set(left_out):
                archive.writestr(name, members[name])
        return ["--archive", str(tmp_path / "cells.mar")]

    return write


def test_the_queue_is_long_enough_for_the_workers_of_all_devices(command, written):
    own = written(jobQueueSize=300, responseTimeout=60)

    def settings(devices, *options):
        found = command._settings(command._parser().parse_args([*own, *options]), devices)
        assert found["responseTimeout"] == 60
        return found["batchSize"], found["minWorkers"], found["jobQueueSize"]

    assert settings(1) == (8, 2, 300)
    # Four times what all workers take at once.
    assert settings(8, "--workers", "6", "--batch-size", "64") == (64, 48, 4 * 64 * 48)
    assert settings(8) == (8, 16, 512)


def test_settings_that_are_left_out_have_torchserves_defaults_and_old_archives_are_refused(command, written):
    def settings(own):
        return command._settings(command._parser().parse_args(own), 1)

    found = settings(written())
    assert (found["jobQueueSize"], found["responseTimeout"]) == (100, 120)
    with pytest.raises(ScriptError, match=r"jobQueueSize of .* is 'many'; accepted is a whole number"):
        settings(written(jobQueueSize="many"))
    with pytest.raises(ScriptError, match=r"damoyolo/opening\.py.*build_archive"):
        settings(written(left_out=["damoyolo/opening.py"]))


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
