"""The fuzz command's eyes: what it must notice about a server, which here is a stand-in."""

import json
import os
import time

import pytest

from lib.cli import ScriptError
from lib.load.hostile import FORMS, HostileClient, Limits, summarize
from lib.server.served_archive import ServedModel

import fuzz_server
from doubles.stand_in_server import Reply, StandInServer, failed, found

GOOD = b"good image"
BOX = {"class_id": 0, "label": "cat", "score": 0.5, "bbox": [1.0, 2.0, 3.0, 4.0]}


@pytest.fixture
def try_file(tmp_path):
    """The attempt of sending a file of these bytes to a server that answers it as told."""

    def attempt(answer_to_file, answer_to_good=lambda: found(BOX), pid_after=None, **limits):
        state = {"file_seen": False}

        def answer(asked):
            if asked.method == "GET":
                pid = pid_after if pid_after and state["file_seen"] else os.getpid()
                return Reply(body=json.dumps([{"workers": [{"pid": pid}]}]).encode())
            if asked.body == GOOD:
                return answer_to_good() if state["file_seen"] else found(BOX)
            return answer_to_file()

        (tmp_path / "file").write_bytes(b"hostile")
        with StandInServer(answer) as server:
            base = server.url.removesuffix("/predictions/damoyolo")
            served = ServedModel(base, base, "", "damoyolo")
            client = HostileClient(served, [GOOD], Limits(**{"seconds": 30, "memory_mb": 1e5, **limits}))
            state["file_seen"] = True
            try:
                (result,) = client.try_files([tmp_path / "file"], ["raw"])
            finally:
                client.close()
        return result

    return attempt


def test_a_refusal_is_no_problem(try_file):
    attempt = try_file(lambda: failed(415, "UnsupportedImage", "no image"))
    assert attempt.status == 415
    assert attempt.problems == ()
    assert "415: 1" in summarize([attempt])


def test_a_server_error_is_a_problem(try_file):
    assert try_file(lambda: failed(500, "InternalError", "")).problems == ("status 500",)


def test_a_dropped_connection_is_a_problem(try_file):
    attempt = try_file(lambda: Reply(drop=True))
    assert attempt.status == 0
    assert attempt.problems == ("no answer: ConnectionError",)


@pytest.mark.parametrize(
    "other",
    [found(), found({**BOX, "score": 0.6}), found({**BOX, "bbox": [1, 2, 9, 4]}), failed(503, "", "")],
)
def test_another_answer_to_a_neighbour_is_a_problem(try_file, other):
    (problem,) = try_file(lambda: found(), lambda: other).problems
    assert "neighbour" in problem


def test_a_neighbour_may_differ_by_rounding(try_file):
    rounded = found({**BOX, "score": 0.51, "bbox": [1.5, 2.0, 3.0, 4.0]})
    assert try_file(lambda: found(), lambda: rounded).problems == ()


def test_the_end_of_a_worker_is_a_problem(try_file):
    assert try_file(lambda: found(), pid_after=1).problems == ("a worker ended",)


def test_time_over_the_limit_is_a_problem(try_file):
    def slow():
        time.sleep(0.3)
        return found()

    (problem,) = try_file(slow, seconds=0.2).problems
    assert "the limit is 0.2 s" in problem


def test_memory_over_the_limit_is_a_problem(try_file):
    """The worker is this process."""

    def large():
        written = b"x" * 100_000_000
        return found() if written else None

    (problem,) = try_file(large, memory_mb=50).problems
    assert "the limit is 50 MB" in problem


def test_a_server_that_fails_good_images_is_not_tried(tmp_path):
    with StandInServer(lambda asked: failed(503, "", "")) as server:
        base = server.url.removesuffix("/predictions/damoyolo")
        with pytest.raises(ScriptError, match="good image"):
            HostileClient(ServedModel(base, base, "", "damoyolo"), [GOOD], Limits(1, 1))


def test_the_command_offers_every_form():
    assert set(fuzz_server.FORM_NAMES) == set(FORMS)
