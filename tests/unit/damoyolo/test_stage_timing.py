"""The clock over the stages."""

import time

import pytest
import torch

from damoyolo.stage_timing import StageClock


def test_the_clock_sums_each_stage_and_starts_again_when_read():
    clock = StageClock(torch.device("cpu"))
    for stage, seconds in (("a", 0.02), ("b", 0.01), ("a", 0.02)):
        with clock(stage):
            time.sleep(seconds)
    totals = clock.read_seconds()
    assert totals["a"] >= 0.04
    assert 0.01 <= totals["b"] < totals["a"]
    assert clock.read_seconds() == {}


def test_a_stage_that_fails_is_timed_too():
    clock = StageClock(torch.device("cpu"))
    with pytest.raises(ValueError, match="no"), clock("a"):
        raise ValueError("no")
    assert "a" in clock.read_seconds()


def test_a_stage_is_timed_on_the_stream_of_the_clock_s_device(monkeypatch):
    recorded = []

    class Event:
        """In place of a CUDA event."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            recorded.append(stream)

        def synchronize(self):
            """Nothing to wait for."""

        def elapsed_time(self, _end):
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = StageClock(torch.device("cuda:1"))
    with clock("a"):
        pass
    assert clock.read_seconds() == {"a": 0.005}
    assert recorded == ["stream of cuda:1"] * 2
