"""wrk against a stand-in, and what it prints."""

import shutil

import pytest

from lib.cli import ScriptError
from lib.load.worker import Load
from lib.measure.wrk import _parse, find_wrk, measure_by_wrk

from doubles.stand_in_server import Reply, StandInServer


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_wrk_sends_every_body_with_the_headers_and_its_figures_are_read():
    seen = set()

    def reply(asked):
        seen.add((asked.body, asked.headers["X-Form"]))
        return Reply(200 if asked.body == b"good" else 500, b"{}")

    with StandInServer(reply) as server:
        load = Load(
            server.base_url, [b"good", b"bad"], 2, duration_s=1, timeout_s=5, headers=(("X-Form", "a"),)
        )
        row = measure_by_wrk(find_wrk(), load)
    assert seen == {(b"good", "a"), (b"bad", "a")}
    assert row["requests_per_s"] > 0
    assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert row["errors"] > 0


def test_answers_with_another_status_are_errors_and_no_images():
    row = _parse("Running 2s test\nfound 300 2000000 1500.000000 90000.000000 100\n", "")
    assert row == {"requests_per_s": 100.0, "p50_ms": 1.5, "p99_ms": 90.0, "errors": 100}


def test_a_failure_of_wrk_is_named():
    with pytest.raises(ScriptError, match="unable to connect"):
        _parse("", "unable to connect to 127.0.0.1")
