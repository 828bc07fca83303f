"""The clock over the stages."""

from __future__ import annotations

import time

import pytest
import torch

from damoyolo.stage_timing import StageClock


def test_the_clock_sums_each_stage_and_starts_again_when_read() -> None:
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
