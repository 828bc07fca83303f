"""What a soak does when server or worker fail, its figures, and what counts as a wrong answer."""

import contextlib
import json
import os
import threading
import time

import pytest

from lib.cli import ScriptError
from lib.load import soak as soak_module
from lib.load.mixed_requests import MixedRequest
from lib.load.soak import SoakRecord, memory_mb, soak
from lib.server.served_archive import ServedModel

import soak_server
from damoyolo.errors import CorruptImageError
from damoyolo.service import Answer
from doubles.images import encode_jpeg, make_pixels
from doubles.stand_in_server import Reply, StandInServer, failed

BOX = {"class_id": 0, "label": "cat", "score": 0.5, "bbox": [1.0, 2.0, 3.0, 4.0]}
JSON = "application/json"


def as_json(*detections):
    return json.dumps({"width": 64, "height": 48, "detections": detections}).encode()


def test_latencies_are_given_for_full_minutes():
    record = SoakRecord(answers=[(second, 10.0 if second < 60 else 20.0) for second in range(130)])
    assert [minute["p99"] for minute in record.latencies_by_minute()] == [10.0, 20.0]


def test_a_minute_without_answers_has_no_latencies():
    record = SoakRecord(answers=[(10.0, 5.0), (130.0, 6.0)])
    first, second = record.latencies_by_minute()
    assert first["max"] == 5.0
    assert second is None


def test_the_growth_of_p99_is_that_from_the_second_minute_to_the_last():
    latencies = {0: 90.0, 1: 10.0, 2: 50.0, 3: 15.0}
    record = SoakRecord(answers=[(s, latencies.get(s // 60, 15.0)) for s in range(241)])
    assert record.p99_growth() == 1.5
    assert SoakRecord(answers=record.answers[:150]).p99_growth() is None


def test_a_record_of_nothing_is_json():
    record = SoakRecord().to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "interrupted": False,
        "answers": 0,
        "problems": {},
        "by_minute_ms": [],
        "p99_growth": None,
        "slopes_of_the_second_half_mb_per_h": {},
        "memory_mb": [],
        "examples": [],
    }


def test_memory_slopes_are_those_of_the_last_part():
    sizes = [(0.0, 500.0), (1800.0, 1000.0), (2700.0, 1010.0), (3600.0, 1020.0)]
    record = SoakRecord(memory_mb=[(at, {"worker": size}) for at, size in sizes])
    assert record.memory_slopes_mb_per_h(1800) == {"worker": pytest.approx(40.0)}


SUCCESS = MixedRequest(b"", {}, Answer(as_json(BOX), JSON))
REFUSAL = MixedRequest(b"", {}, Answer(b'{"code": 422}', JSON, CorruptImageError("broken")))
DRAWN = MixedRequest(b"", {}, Answer(encode_jpeg(make_pixels(48, 64)), "image/jpeg"))


@pytest.mark.parametrize(
    ("request_", "answer", "problem"),
    [
        (SUCCESS, (200, JSON, as_json({**BOX, "score": 0.51})), ""),
        (
            SUCCESS,
            (200, JSON, as_json()),
            "other content than in process (cat 0.500 at [1.0, 2.0, 3.0, 4.0] is missing)",
        ),
        (SUCCESS, (503, JSON, b"{}"), "status 503 in place of 200"),
        (SUCCESS, (200, "text/plain", as_json(BOX)), "text/plain in place of application/json"),
        (REFUSAL, (422, JSON, b'{"code": 422}'), ""),
        (REFUSAL, (422, JSON, b'{"code": 415}'), "other content than in process ({'code': 415})"),
        (REFUSAL, (200, JSON, as_json(BOX)), "status 200 in place of 422"),
        (DRAWN, (200, "image/jpeg", encode_jpeg(make_pixels(48, 64, seed=1))), ""),
        (DRAWN, (200, "image/jpeg", encode_jpeg(make_pixels(64, 48))), "a drawn image of another size"),
    ],
)
def test_an_answer_is_compared_with_that_in_process(request_, answer, problem):
    assert request_.problem_with(*answer) == problem


@pytest.fixture
def serve(monkeypatch):
    """A stand-in for the server: answers images as told; the pids of its workers are `worker_pids()`."""
    monkeypatch.setattr(soak_module, "MEMORY_INTERVAL_S", 0.05)
    monkeypatch.setattr(soak_module.shutil, "which", lambda _name: None)

    @contextlib.contextmanager
    def start(answer_to_image=None, worker_pids=lambda: [os.getpid()]):
        def answer(asked):
            if asked.method == "GET":
                workers = [{"pid": pid} for pid in worker_pids()]
                return Reply(body=json.dumps([{"workers": workers}]).encode())
            if answer_to_image is not None:
                return answer_to_image(asked)
            return Reply(body=as_json(BOX), headers={"Content-Type": JSON})

        with StandInServer(answer) as server:
            base = server.url.removesuffix("/predictions/damoyolo")
            yield ServedModel(base, base, "", "damoyolo")

    return start


ENDED = 2**22 + 1  # above every process id of Linux


def test_an_answer_that_cannot_be_read_is_a_problem(serve):
    def no_image(_asked):
        return Reply(body=b"no image", headers={"Content-Type": "image/jpeg"})

    with serve(no_image) as served:
        record = soak(served, [DRAWN], clients=1, duration_s=0.2)
    assert set(record.problems) == {"an answer that cannot be read: UnidentifiedImageError"}


def test_right_answers_and_memory_are_recorded(serve):
    with serve() as served:
        record = soak(served, [SUCCESS], clients=2, duration_s=0.3)
    assert record.problems == {}
    assert record.answers
    assert set(record.memory_mb[0][1]) == {"worker", "java"}
    assert min(record.memory_mb[0][1].values()) > 1
    json.dumps(record.to_json(), allow_nan=False)


def test_requests_are_sent_at_the_rate_that_is_given(serve):
    with serve() as served:
        record = soak(served, [SUCCESS], clients=4, duration_s=1.0, rate_per_s=20)
    assert record.problems == {}
    assert len(record.answers) <= 20 + 4


@pytest.mark.parametrize(
    ("pids", "problem"),
    [
        ([ENDED], "no memory sample: NoSuchProcess"),
        ([], "no memory sample: LookupError"),
        (["unknown"], "no memory sample: ValueError"),
        ([-1], "no memory sample: ValueError"),
    ],
)
def test_the_soak_goes_on_without_a_worker(serve, pids, problem):
    """A worker has ended; its successor has not started, or has no process id yet."""
    samples = 0

    def worker_pids():
        nonlocal samples
        samples += 1
        return [os.getpid()] if samples in (1, 4) else pids

    with serve(worker_pids=worker_pids) as served:
        record = soak(served, [SUCCESS], clients=1, duration_s=0.8)
    assert set(record.problems) == {problem}
    assert len(record.memory_mb) == 2
    assert record.answers[-1][0] > 0.6


def test_the_soak_goes_on_when_the_management_api_fails(serve):
    with serve() as served:
        broken = ServedModel(served.inference_url, "http://127.0.0.1:1", "", "damoyolo")
        record = soak(broken, [SUCCESS], clients=1, duration_s=0.3)
    assert set(record.problems) == {"no memory sample: ConnectionError"}
    assert record.memory_mb == []
    assert record.answers
    json.dumps(record.to_json(), allow_nan=False)


@pytest.fixture
def interrupt_at_second_sample(monkeypatch):
    """Ctrl-C while the memory is sampled for the second time."""
    samples = []

    def interrupted(_served):
        samples.append({"worker": 1.0})
        if len(samples) > 1:
            time.sleep(0.5)  # for some answers
            raise KeyboardInterrupt
        return samples[0]

    monkeypatch.setattr(soak_module, "memory_mb", interrupted)


def test_an_interrupt_ends_the_clients_and_keeps_the_record(serve, interrupt_at_second_sample):
    start = time.monotonic()
    with serve() as served:
        record = soak(served, [SUCCESS], clients=2, duration_s=60)
    assert time.monotonic() - start < 10
    assert record.interrupted
    assert record.answers
    assert len(record.memory_mb) == 1


def test_an_interrupt_does_not_wait_for_a_silent_server(serve, interrupt_at_second_sample, monkeypatch):
    monkeypatch.setattr(soak_module, "ABANDONED_AFTER_S", 0.1)
    release, asked = threading.Event(), []

    def answer(_asked):
        asked.append(1)
        if len(asked) > 1:
            release.wait(60)
        return Reply(body=as_json(BOX), headers={"Content-Type": JSON})

    start = time.monotonic()
    with serve(answer) as served:
        record = soak(served, [SUCCESS], clients=2, duration_s=60)
        took_s = time.monotonic() - start
        release.set()
    assert took_s < 10
    assert record.interrupted
    assert record.answers == []


def test_a_client_without_an_answer_pauses(serve):
    first = threading.Event()
    asked_again = []

    def answer(asked):
        if first.is_set():
            asked_again.append(asked)
            return Reply(drop=True)
        first.set()
        return Reply(body=as_json(BOX), headers={"Content-Type": JSON})

    with serve(answer) as served:
        record = soak(served, [SUCCESS], clients=1, duration_s=1.5)
    assert 1 <= record.problems["no answer: ConnectionError"] <= 2
    assert record.answers == []
    assert len(asked_again) <= 4  # a dropped connection may be opened a second time


def test_a_server_that_answers_nothing_is_refused_at_once(serve):
    with serve(lambda asked: Reply(drop=True)) as served, pytest.raises(ScriptError, match="no answer from"):
        soak(served, [SUCCESS], clients=1, duration_s=60)


def test_an_error_answer_at_the_start_is_an_answer(serve):
    with serve(lambda asked: failed(503, "", "")) as served:
        record = soak(served, [SUCCESS], clients=1, duration_s=0.2)
    assert set(record.problems) == {"status 503 in place of 200"}


def test_memory_is_that_of_workers_and_their_parent(serve):
    with serve(worker_pids=lambda: [os.getpid()] * 2) as served:
        sizes = memory_mb(served)
    assert sizes["worker"] > 2 * 10


@pytest.fixture
def command(serve, monkeypatch, tmp_path):
    """Exit code and record of the command against a stand-in."""
    monkeypatch.setattr("lib.load.mixed_requests.mixed_requests", lambda *_: [SUCCESS])

    def run(*further, **server):
        with serve(**server) as served:
            urls = ["--url", served.inference_url, "--management-url", served.management_url]
            file = tmp_path / "new" / "soak.json"
            options = ["--archive", "a.mar", "--minutes", "0.005", "--clients", "1", "--json", str(file)]
            code = soak_server.main([*urls, *options, *further])
        return code, json.loads(file.read_text()) if file.exists() else None

    return run


def test_the_command_reports_what_it_saw(command, capsys):
    code, record = command()
    assert code == 0
    assert record["answers"] > 0
    assert "no problems" in capsys.readouterr().out


def test_the_command_sends_a_share_of_the_rate_and_draws_the_plot(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(soak_server, "RATE_MEASURED_S", 0.3)
    code, _ = command("--rate-share", "0.5", "--plot", str(tmp_path / "soak.png"))
    assert code == 0
    assert "50% of what the server answers" in capsys.readouterr().out
    assert (tmp_path / "soak.png").stat().st_size > 1000


def test_the_command_sends_at_a_given_rate_but_not_at_two(command, capsys):
    assert command("--rate", "20")[0] == 0
    with pytest.raises(SystemExit):
        command("--rate", "20", "--rate-share", "0.5")
    assert "not allowed with" in capsys.readouterr().err


def test_the_interrupted_command_writes_and_prints_what_it_saw(
    command, capsys, tmp_path, interrupt_at_second_sample
):
    code, record = command("--plot", str(tmp_path / "new" / "soak.png"), "--minutes", "5")
    assert code == 130
    assert record["interrupted"]
    assert record["answers"] > 0
    out, err = capsys.readouterr()
    assert "no problems" in out
    assert err == "soak_server: interrupted; the figures are those until then\n"
    assert (tmp_path / "new" / "soak.png").stat().st_size > 1000


def test_the_command_fails_if_p99_grew(command, capsys, monkeypatch):
    monkeypatch.setattr(SoakRecord, "p99_growth", lambda _self: 1.31)
    code, record = command()
    assert code == 1
    assert record["problems"] == {"p99 grew": 1}


def test_the_command_writes_the_record_of_a_soak_without_memory(command, capsys):
    code, record = command(worker_pids=lambda: [])
    assert code == 1
    assert record["memory_mb"] == []
    assert "times: no memory sample: LookupError" in capsys.readouterr().out


def test_the_command_without_a_server_ends_with_2(command, capsys):
    assert command(answer_to_image=lambda asked: Reply(drop=True)) == (2, None)
    assert "start a server" in capsys.readouterr().err
