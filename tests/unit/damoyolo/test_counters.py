"""Counters that are sent at intervals."""

from __future__ import annotations

import time

from damoyolo.counters import CounterTotals


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
