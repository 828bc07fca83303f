"""Counters that are sent at intervals."""

import time

from damoyolo.counters import CounterTotals


def test_counters_are_sent_at_once_then_summed_until_the_interval_is_over():
    sent = []
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


def test_counters_that_cannot_be_sent_fail_nothing_and_are_logged_once(caplog):
    sent = []

    def send(name, *_):
        if name == "broken":
            raise KeyError(name)
        sent.append(name)

    totals = CounterTotals(send, interval_s=0.0)
    for _ in range(5):
        totals.add({("broken", ()): 1, ("good", ()): 1})
    assert sent == ["good"] * 5
    assert len(caplog.records) == 1
    assert "KeyError" in caplog.text


def test_a_machine_without_a_free_thread_fails_nothing(monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    sent = []
    totals = CounterTotals(lambda _name, _dimensions, value: sent.append(value), interval_s=3600.0)
    totals.add({("n", ()): 1})
    monkeypatch.setattr("threading.Timer.start", start)
    totals.add({("n", ()): 2})
    totals.add({("n", ()): 3})
    totals.flush()
    assert sent == [1, 5]
