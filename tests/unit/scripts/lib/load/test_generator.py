"""The load generator against a stand-in server that answers, stalls, refuses and hangs up as told."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from lib.cli import ScriptError
from lib.load.generator import generate_load, percentiles
from lib.load.worker import Load
from lib.server.process import free_ports

ANSWER = b'{"detections":[]}'
IMAGES = [bytes([number]) * 50_000 for number in range(4)]


def reply(status: int = 200, body: bytes = ANSWER, extra: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


class Seen:
    """What a stand-in server was sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.connections = 0
        self.most_at_once = 0


# What goes back for the n-th request, from 0; b"" hangs up.
Answer = Callable[[int], Awaitable[bytes]]


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, Seen]]:
    """A server on 127.0.0.1 in a thread; its address and what it has seen."""
    seen, at_once = Seen(), 0
    loop = asyncio.new_event_loop()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal at_once
        seen.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                seen.bodies.append(await reader.readexactly(length))
                at_once += 1
                seen.most_at_once = max(seen.most_at_once, at_once)
                try:
                    data = await answer(len(seen.bodies) - 1)
                finally:
                    at_once -= 1
                if not data:
                    return
                writer.write(data)
                await writer.drain()
                if b"connection: close" in data.lower():
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = loop.run_until_complete(asyncio.start_server(handle, "127.0.0.1", 0, limit=2**20))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def stop() -> None:
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/predictions/m", seen
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def after(seconds: float, data: bytes | None = None) -> Answer:
    async def answer(_number: int) -> bytes:
        await asyncio.sleep(seconds)
        return reply() if data is None else data

    return answer


def short_load(url: str, connections: int = 4, **knobs: object) -> Load:
    chosen: dict[str, object] = {"warm_up_s": 0.1, "duration_s": 0.6, "timeout_s": 5.0, "processes": 1}
    return Load(url, IMAGES, connections, **{**chosen, **knobs})  # type: ignore[arg-type]


def test_a_closed_loop_keeps_every_connection_busy_and_measures_what_the_server_takes() -> None:
    with serving(after(0.02)) as (url, seen):
        result = generate_load(short_load(url, connections=4, processes=2))
    assert seen.most_at_once == seen.connections == 4
    assert result.errors == 0
    assert result.statuses.keys() == {200}
    assert 20 <= result.percentiles_ms["p50"] < 60
    assert 4 / 0.06 < result.requests_per_s <= 4 / 0.02
    assert result.mean_answer_bytes == len(ANSWER)
    assert 0 < result.generator_busy_share < 1


def test_every_connection_goes_through_all_images_unharmed() -> None:
    with serving(after(0.0)) as (url, seen):
        generate_load(short_load(url, connections=2))
    counts = [seen.bodies.count(image) for image in IMAGES]
    assert sum(counts) == len(seen.bodies)
    assert min(counts) >= max(counts) - 2 > 0


def test_warming_up_is_not_counted() -> None:
    async def slow_at_first(number: int) -> bytes:
        await asyncio.sleep(0.5 if number == 0 else 0.005)
        return reply()

    with serving(slow_at_first) as (url, seen):
        result = generate_load(short_load(url, connections=1, warm_up_s=0.3))
    assert result.percentiles_ms["max"] < 300
    assert sum(result.statuses.values()) < len(seen.bodies)


def test_an_open_loop_sends_at_its_rate_however_slow_the_answers() -> None:
    with serving(after(0.05)) as (url, _):
        result = generate_load(
            short_load(url, connections=40, rate_per_s=100.0, poisson=False, duration_s=1.0, processes=2)
        )
    assert result.errors == 0
    assert sum(result.statuses.values()) == pytest.approx(100, abs=2)
    assert result.percentiles_ms["p50"] == pytest.approx(55, abs=15)


def test_random_arrivals_come_at_the_rate_too() -> None:
    with serving(after(0.0)) as (url, _):
        result = generate_load(short_load(url, connections=20, rate_per_s=300.0, duration_s=1.0))
    assert sum(result.statuses.values()) == pytest.approx(300, abs=90)  # 5 standard deviations


def test_latency_counts_from_the_arrival_when_no_connection_is_free() -> None:
    # 20 ms each on one connection is 50/s; of 100/s arriving, the last waits for half of the time.
    with serving(after(0.02)) as (url, seen):
        result = generate_load(
            short_load(url, connections=1, rate_per_s=100.0, poisson=False, warm_up_s=0.0, duration_s=1.0)
        )
    assert seen.most_at_once == 1
    assert result.percentiles_ms["max"] > 400
    assert result.requests_per_s <= 50
    assert sum(result.statuses.values()) == pytest.approx(100, abs=2)  # the late ones are answered too


def test_arrivals_that_find_no_connection_within_the_time_limit_are_dropped_and_count_as_late() -> None:
    with serving(after(10.0)) as (url, _):
        result = generate_load(
            short_load(url, connections=1, rate_per_s=50.0, warm_up_s=0.0, duration_s=0.5, timeout_s=0.3)
        )
    assert result.timeouts >= 1
    assert result.dropped >= 5
    assert result.errors == result.timeouts + result.dropped
    assert result.percentiles_ms["p50"] >= 300
    assert result.requests_per_s == 0


def test_a_slow_answer_is_given_up_at_the_time_limit_and_the_next_one_is_asked_for() -> None:
    async def slow_at_times(number: int) -> bytes:
        await asyncio.sleep(2.0 if number % 10 == 5 else 0.005)
        return reply()

    with serving(slow_at_times) as (url, seen):
        started = time.monotonic()
        result = generate_load(short_load(url, connections=2, timeout_s=0.15, warm_up_s=0.0, duration_s=1.0))
        assert time.monotonic() - started < 5
    assert result.timeouts > 1
    assert result.statuses[200] > result.timeouts
    assert result.connection_errors == {}
    assert result.percentiles_ms["max"] >= 150
    assert seen.connections > 2  # what comes late must not be taken for the next answer


def test_error_statuses_are_counted_and_do_not_flatter_the_latencies() -> None:
    async def every_other_refused(number: int) -> bytes:
        if number % 2:
            return reply(503, b"busy", "Connection: close\r\n")
        await asyncio.sleep(0.03)
        return reply()

    with serving(every_other_refused) as (url, seen):
        result = generate_load(short_load(url, connections=3))
    assert result.statuses[503] > 0
    assert result.errors == result.statuses[503]
    assert result.percentiles_ms["p50"] >= 30
    assert seen.connections > 3  # a connection that the server ends is made anew


def test_a_connection_that_breaks_is_an_error_and_the_load_goes_on() -> None:
    async def hang_up_at_times(number: int) -> bytes:
        await asyncio.sleep(0.002)
        return b"" if number % 20 == 10 else reply()

    with serving(hang_up_at_times) as (url, _):
        result = generate_load(short_load(url))
    assert sum(result.connection_errors.values()) > 1
    assert result.statuses[200] > 20
    assert result.errors == sum(result.connection_errors.values())


def test_an_answer_that_is_no_http_is_an_error() -> None:
    with serving(after(0.0, b"SMTP ready\r\n\r\n")) as (url, _):
        result = generate_load(short_load(url, duration_s=0.3))
    assert result.connection_errors.keys() == {"UnreadableAnswer"}


def test_an_answer_in_pieces_is_put_together() -> None:
    body = bytes(300_000)
    with serving(after(0.0, reply(body=body))) as (url, _):
        result = generate_load(short_load(url, connections=2, duration_s=0.3))
    assert result.errors == 0
    assert result.mean_answer_bytes == len(body)


def test_nobody_listening_is_reported_and_not_asked_in_a_tight_loop() -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}/"
    result = generate_load(short_load(url, connections=2))
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
def test_a_load_that_cannot_be_sent_is_refused(
    url: str, bodies: list[bytes], rate_per_s: float | None, message: str
) -> None:
    with pytest.raises(ScriptError, match=message):
        generate_load(Load(url, bodies, 1, rate_per_s))


def test_percentiles_are_values_that_occurred() -> None:
    found = percentiles(np.arange(1.0, 1001.0))
    assert (found["p50"], found["p99"], found["p99.9"], found["max"]) == (500, 990, 999, 1000)
