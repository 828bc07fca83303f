"""The load generator against a stand-in server that answers, stalls, refuses and hangs up as told."""

import json
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from lib.cli import ScriptError
from lib.load import generator
from lib.load.generator import generate_load, percentiles
from lib.load.worker import Load
from lib.server.process import free_ports

from doubles.stand_in_server import Reply, StandInServer

ANSWER = b'{"detections":[]}'
IMAGES = [bytes([number]) * 50_000 for number in range(4)]


def answering(delay_s, reply=lambda _: Reply(body=ANSWER)):
    """A server that answers the n-th request, from 0, with `reply(n)` after a delay, constant or by n."""
    numbers = count()

    def answer(_asked):
        number = next(numbers)
        time.sleep(delay_s(number) if callable(delay_s) else delay_s)
        return reply(number)

    return StandInServer(answer)


def measure(url, connections=4, **knobs):
    """The result of a short load."""
    chosen = {"warm_up_s": 0.1, "duration_s": 0.6, "timeout_s": 5.0, "processes": 1, **knobs}
    return generate_load(Load(url, IMAGES, connections, **chosen))


def test_a_closed_loop_keeps_every_connection_busy_and_measures_what_the_server_takes():
    with answering(0.02) as server:
        result = measure(server.url, connections=4, processes=2)
    assert server.most_at_once == len(server.connections) == 4
    assert result.errors == 0
    assert result.statuses.keys() == {200}
    assert 20 <= result.percentiles_ms["p50"] < 60
    assert 4 / 0.06 < result.requests_per_s <= 4 / 0.02
    assert result.mean_answer_bytes == len(ANSWER)
    assert 0 < result.generator_busy_share < 1


def test_every_connection_goes_through_all_images_unharmed():
    with answering(0.0) as server:
        measure(server.url, connections=2)
    bodies = [asked.body for asked in server.asked]
    counts = [bodies.count(image) for image in IMAGES]
    assert sum(counts) == len(bodies)
    assert min(counts) >= max(counts) - 2 > 0


def test_warming_up_is_not_counted():
    with answering(lambda number: 0.005 if number else 0.5) as server:
        result = measure(server.url, connections=1, warm_up_s=0.3)
    assert result.percentiles_ms["max"] < 300
    assert sum(result.statuses.values()) < len(server.asked)


def test_an_open_loop_sends_at_its_rate_however_slow_the_answers():
    with answering(0.05) as server:
        result = measure(
            server.url, connections=40, rate_per_s=100.0, poisson=False, duration_s=1.0, processes=2
        )
    assert result.errors == 0
    assert sum(result.statuses.values()) == pytest.approx(100, abs=2)
    assert result.percentiles_ms["p50"] == pytest.approx(55, abs=15)


def test_random_arrivals_come_at_the_rate_too():
    with answering(0.0) as server:
        result = measure(server.url, connections=20, rate_per_s=300.0, duration_s=1.0)
    assert sum(result.statuses.values()) == pytest.approx(300, abs=90)  # 5 standard deviations


def test_latency_counts_from_the_arrival_when_no_connection_is_free():
    # 20 ms each on one connection is 50/s; of 100/s arriving, the last waits for half of the time.
    with answering(0.02) as server:
        result = measure(
            server.url, connections=1, rate_per_s=100.0, poisson=False, warm_up_s=0.0, duration_s=1.0
        )
    assert server.most_at_once == 1
    assert result.percentiles_ms["max"] > 400
    assert result.requests_per_s <= 50
    assert sum(result.statuses.values()) == pytest.approx(100, abs=2)  # the late ones are answered too


def test_arrivals_that_find_no_connection_within_the_time_limit_are_dropped_and_count_as_late():
    with answering(10.0) as server:
        result = measure(
            server.url, connections=1, rate_per_s=50.0, warm_up_s=0.0, duration_s=0.5, timeout_s=0.3
        )
    assert result.timeouts >= 1
    assert result.dropped >= 5
    assert result.errors == result.timeouts + result.dropped
    assert result.percentiles_ms["p50"] >= 300
    assert result.requests_per_s == 0


def test_a_slow_answer_is_given_up_at_the_time_limit_and_the_next_one_is_asked_for():
    with answering(lambda number: 2.0 if number % 10 == 5 else 0.005) as server:
        started = time.monotonic()
        result = measure(server.url, connections=2, timeout_s=0.15, warm_up_s=0.0, duration_s=1.0)
        assert time.monotonic() - started < 5
    assert result.timeouts > 1
    assert result.statuses[200] > result.timeouts
    assert result.connection_errors == {}
    assert result.percentiles_ms["max"] >= 150
    assert len(server.connections) > 2  # what comes late must not be taken for the next answer


def test_error_statuses_are_counted_and_do_not_flatter_the_latencies():
    def every_other_refused(number):
        return Reply(503, b"busy") if number % 2 else Reply(body=ANSWER)

    with answering(lambda number: 0.0 if number % 2 else 0.03, every_other_refused) as server:
        result = measure(server.url, connections=3)
    assert result.statuses[503] > 0
    assert result.errors == result.statuses[503]
    assert result.percentiles_ms["p50"] >= 30
    assert len(server.connections) > 3  # a connection that the server ends is made anew


def test_a_connection_that_breaks_is_an_error_and_the_load_goes_on():
    def hang_up_at_times(number):
        return Reply(drop=True) if number % 20 == 10 else Reply(body=ANSWER)

    with answering(0.002, hang_up_at_times) as server:
        result = measure(server.url)
    assert sum(result.connection_errors.values()) > 1
    assert result.statuses[200] > 20
    assert result.errors == sum(result.connection_errors.values())


def test_an_answer_that_is_no_http_is_an_error():
    with StandInServer(lambda _: Reply(drop=True, body=b"SMTP ready\r\n\r\n")) as server:
        result = measure(server.url, duration_s=0.3)
    assert result.connection_errors.keys() == {"UnreadableAnswer"}


def test_an_answer_in_pieces_is_put_together():
    body = bytes(300_000)
    with StandInServer(lambda _: Reply(body=body)) as server:
        result = measure(server.url, connections=2, duration_s=0.3)
    assert result.errors == 0
    assert result.mean_answer_bytes == len(body)


def test_nobody_listening_is_reported_and_not_asked_in_a_tight_loop():
    url = f"http://127.0.0.1:{free_ports(1)[0]}/"
    result = measure(url, connections=2)
    assert result.requests_per_s == 0
    assert result.connection_errors.keys() == {"ConnectionRefusedError"}
    assert result.errors <= 2 * 0.6 / 0.05 + 2
    assert np.isnan(result.percentiles_ms["p99"])
    assert result.row()["p99_ms"] is None
    json.dumps(result.row(), allow_nan=False)


@pytest.mark.parametrize(
    ("url", "bodies", "rate_per_s", "message"),
    [
        ("https://127.0.0.1/", [b"x"], None, "http://host:port"),
        ("http://127.0.0.1/", [], None, "at least one"),
        ("http://127.0.0.1/", [b"x"], 0.0, "above 0"),
    ],
)
def test_a_load_that_cannot_be_sent_is_refused(url, bodies, rate_per_s, message):
    with pytest.raises(ScriptError, match=message):
        generate_load(Load(url, bodies, 1, rate_per_s))


def test_percentiles_are_values_that_occurred():
    found = percentiles(np.arange(1.0, 1001.0))
    assert (found["p50"], found["p99"], found["p99.9"], found["max"]) == (500, 990, 999, 1000)


def test_a_process_of_the_generator_imports_neither_torch_nor_numpy():
    code = "import sys, lib.load.worker; print({'torch', 'numpy'} & sys.modules.keys())"
    scripts_dir = Path(generator.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=scripts_dir, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
