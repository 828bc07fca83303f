"""The clock over the stages, and counters sent now and then."""

from __future__ import annotations

import time

import pytest
import torch

from damoyolo.counters import CounterTotals
from damoyolo.stage_timing import StageClock


def test_the_clock_sums_each_stage_and_starts_anew_when_read() -> None:
    clock = StageClock(torch.device("cpu"))
    for stage, seconds in (("a", 0.02), ("b", 0.01), ("a", 0.02)):
        with clock(stage):
            time.sleep(seconds)
    totals = clock.read_seconds()
    assert totals["a"] >= 0.04
    assert 0.01 <= totals["b"] < totals["a"]
    assert clock.read_seconds() == {}


def test_a_stage_that_fails_is_timed_too() -> None:
    clock = StageClock(torch.device("cpu"))
    with pytest.raises(ValueError, match="no"), clock("a"):
        raise ValueError("no")
    assert "a" in clock.read_seconds()


def test_counters_are_sent_at_once_then_summed_until_the_interval_is_over() -> None:
    sent: list[tuple[str, tuple[str, ...], float]] = []
    totals = CounterTotals(lambda *counter: sent.append(counter), interval_s=0.2)
    totals.add({("n", ()): 1})
    assert sent == [("n", (), 1)]
    totals.add({("n", ()): 2, ("m", ("x",)): 5})
    totals.add({("n", ()): 3})
    assert len(sent) == 1
    deadline = time.monotonic() + 5
    while len(sent) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(sent[1:]) == [("m", ("x",), 5), ("n", (), 5)]
