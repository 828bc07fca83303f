"""Servers measured in turn, with stand-ins for them, and the table of what was measured."""

import contextlib
import json

import pytest

from lib.cli import ScriptError
from lib.load.worker import Load
from lib.measure import server_rounds
from lib.measure.compared_servers import RunningServer, Server
from lib.measure.reference_answers import Reference
from lib.measure.request_forms import RAW
from lib.measure.server_rounds import Plan, markdown_table, measure_rounds, summarised

from doubles.stand_in_server import Reply, StandInServer

FOUND = {"class_id": 1, "label": "RBC", "score": 0.9, "bbox": [1.0, 2.0, 3.0, 4.0]}
TEXT = json.dumps({"detections": [FOUND]}).encode()
REFERENCE = Reference(100.0, "fp32", [TEXT], [[FOUND]])
BASE = Load("", [b"image"], 1, warm_up_s=0.05, duration_s=0.2, timeout_s=5.0, processes=1)


def stand_in(text, started, name, form=RAW):
    @contextlib.contextmanager
    def start(_bench):
        started.append(name)
        with StandInServer(lambda _: Reply(200, text)) as server:
            yield RunningServer(server.base_url, 1.5)

    return Server(name.upper(), start, form)


@contextlib.contextmanager
def broken(_bench):
    raise ScriptError("line one\nno such program")
    yield


@pytest.fixture
def started(monkeypatch):
    names = []
    other = json.dumps({"detections": [{**FOUND, "score": 0.9005}]}).encode()
    servers = {
        "same": stand_in(TEXT, names, "same"),
        "near": stand_in(other, names, "near"),
        "wrong": stand_in(b'{"detections": []}', names, "wrong"),
        "empty": stand_in(b" ", names, "empty", form=None),
        "broken": Server("Broken", broken, RAW),
    }
    monkeypatch.setattr(server_rounds, "SERVERS", servers)
    return names


def measured(names, rounds=1, concurrencies=(1,)):
    rows = []
    measure_rounds(None, Plan(BASE, concurrencies, names, rounds), REFERENCE, rows.append)
    return rows


def test_the_order_is_reversed_from_round_to_round(started):
    rows = measured(["same", "near"], rounds=3)
    assert started == ["same", "near", "near", "same", "same", "near"]
    assert [row["round"] for row in rows] == [0, 0, 1, 1, 2, 2]


def test_answers_are_checked_before_the_load(started):
    rows = {row["server"]: row for row in measured(["same", "near", "wrong", "empty"])}
    assert (rows["same"]["equal"], rows["same"]["wrong"]) == (1, [])
    assert (rows["near"]["equal"], rows["near"]["wrong"]) == (0, [])
    assert rows["wrong"]["wrong"] == ["image 0: RBC 0.900 at [1.0, 2.0, 3.0, 4.0] is missing"]
    assert "wrong" not in rows["empty"]
    assert all(row["errors"] == 0 for row in rows.values())


def test_a_server_that_does_not_start_is_left_out_with_the_last_line_of_the_reason(started):
    rows = measured(["broken", "same"])
    assert rows[0] == {
        "server": "broken",
        "round": 0,
        "network_per_s": 100.0,
        "left_out": "no such program",
    }
    assert rows[1]["requests_per_s"] > 0
    assert "Broken is left out: no such program" in markdown_table(summarised(rows))


def test_a_server_that_refuses_the_images_is_left_out(started, monkeypatch):
    @contextlib.contextmanager
    def start(_bench):
        with StandInServer(lambda _: Reply(503, b"busy")) as server:
            yield RunningServer(server.base_url, 1.5)

    monkeypatch.setitem(server_rounds.SERVERS, "busy", Server("Busy", start, RAW))
    assert measured(["busy"])[0]["left_out"] == "status 503 for an image: busy"


def row(server, rate, **values):
    times = {
        "p50_ms": 10.0,
        "p99_ms": 20.0,
        "start_s": 2.0,
        "generator_busy_share": 0.1,
        "network_per_s": 100.0,
    }
    check = {"checked": 3, "equal": 3, "wrong": []}
    return {
        "server": server,
        "connections": 4,
        "tool": "generator",
        "requests_per_s": rate,
        "errors": 0,
        **times,
        **check,
        **values,
    }


def test_the_table_has_medians_and_ranges_over_the_rounds(started):
    rows = [row("same", 50.0), row("same", 80.0), row("same", 60.0, p99_ms=90.0)]
    rows += [{"server": "same", "connections": 4, "tool": "wrk", "requests_per_s": 70.0, "errors": 1}]
    rows += [row("near", 1234.5, equal=2), row("wrong", 5.0, wrong=["a", "b"])]
    table = markdown_table(summarised(rows)).splitlines()
    assert table[2] == "| SAME | 4 | 60.0 (50.0 to 80.0) | 60% | 70.0 | 10.0, 20.0 | 1 | equal | - | 2.0 |"
    assert "1,234.5" in table[3]
    assert "| right |" in table[3]
    assert "| 2 wrong |" in table[4]


def test_a_limit_has_no_share_of_the_network(started):
    (summary,) = summarised([row("empty", 900.0)])
    assert summary["of_network"] is None
