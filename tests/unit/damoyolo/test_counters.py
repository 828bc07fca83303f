"""Counters and histograms that are sent at intervals."""

import time

import pytest

from damoyolo.counters import Histogram, MetricTotals

BUCKETS = {"h": (1, 2.5)}


def wait_for(sent, count):
    deadline = time.monotonic() + 5
    while len(sent) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def totals_that_send_to(sent, interval_s=3600.0, **others):
    """By default only when they are told to."""
    totals = MetricTotals(lambda *row: sent.append(row), interval_s, BUCKETS, **others)
    if interval_s == 3600.0:
        totals._sent_at = time.monotonic()
    return totals


def test_counters_are_sent_soon_then_summed_until_the_interval_is_over():
    sent = []
    totals = totals_that_send_to(sent, interval_s=0.3)
    totals.add({("n", ()): 1})
    wait_for(sent, 1)
    assert sent == [("n", (), 1)]
    totals.add({("n", ()): 2, ("m", ("x",)): 5})
    totals.add({("n", ()): 3})
    assert len(sent) == 1
    wait_for(sent, 3)
    assert sorted(sent[1:]) == [("m", ("x",), 5), ("n", (), 5)]


def test_a_histogram_is_three_cumulative_counters():
    histogram = Histogram((1, 2.5))
    assert histogram.take() == [
        ("_sum", (), 0.0),
        ("_count", (), 0),
        ("_bucket", ("1.0",), 0),
        ("_bucket", ("2.5",), 0),
        ("_bucket", ("+Inf",), 0),
    ]
    histogram.observe(1.0)  # bounds are inclusive
    histogram.observe(2.0, times=3)
    histogram.observe(9.0)
    assert histogram.take() == [
        ("_sum", (), 16.0),
        ("_count", (), 5),
        ("_bucket", ("1.0",), 1),
        ("_bucket", ("2.5",), 4),
        ("_bucket", ("+Inf",), 5),
    ]
    histogram.observe(2.0)
    assert histogram.take() == [
        ("_sum", (), 2.0),
        ("_count", (), 1),
        ("_bucket", ("2.5",), 1),
        ("_bucket", ("+Inf",), 1),
    ]
    assert histogram.take() == []


def test_increments_of_a_histogram_add_up_to_what_was_observed_whenever_they_are_taken():
    values = [0.1 * step for step in range(40)]
    counters = {}
    histogram = Histogram((1, 2.5))
    for index, value in enumerate(values):
        histogram.observe(value)
        if index % 7 == 0:
            for suffix, le, increment in histogram.take():
                counters[suffix, le] = counters.get((suffix, le), 0) + increment
    for suffix, le, increment in histogram.take():
        counters[suffix, le] += increment
    assert counters["_bucket", ("1.0",)] == sum(value <= 1 for value in values)
    assert counters["_bucket", ("2.5",)] == sum(value <= 2.5 for value in values)
    assert counters["_bucket", ("+Inf",)] == counters["_count", ()] == 40
    assert counters["_sum", ()] == pytest.approx(sum(values))


def test_observations_of_one_histogram_stand_apart_by_labels():
    sent = []
    totals = totals_that_send_to(sent)
    totals.add({}, [(("h", ("a",)), 2.0, 4), (("h", ("b",)), 3.0, 1)])
    totals.flush()
    assert ("h_bucket", ("a", "2.5"), 4) in sent
    assert ("h_bucket", ("b", "2.5"), 0) in sent
    assert ("h_sum", ("b",), 3.0) in sent


def test_gauges_are_read_when_counters_are_sent_and_may_fail(caplog):
    sent = []
    value = iter([7.0])
    totals = totals_that_send_to(sent, gauges=lambda: {("g", ()): next(value)})
    totals.add({("n", ()): 1})
    totals.flush()
    assert sent == [("g", (), 7.0), ("n", (), 1)]
    totals.add({("n", ()): 2})
    totals.flush()
    assert sent[2:] == [("n", (), 2)]
    assert len(caplog.records) == 1


def test_metrics_that_cannot_be_sent_fail_nothing_and_are_logged_once(caplog):
    sent = []

    def send(name, *_):
        if name == "broken":
            raise KeyError(name)
        sent.append(name)

    totals = MetricTotals(send, 3600.0, BUCKETS)
    totals._sent_at = time.monotonic()
    for _ in range(5):
        totals.add({("broken", ()): 1, ("good", ()): 1})
        totals.flush()
    totals.add({}, [(("unknown histogram", ()), 1.0, 1)])
    assert sent == ["good"] * 5
    assert len(caplog.records) == 1
    assert "KeyError" in caplog.text


def test_a_machine_without_a_free_thread_fails_nothing(monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    sent = []
    totals = totals_that_send_to(sent)
    monkeypatch.setattr("threading.Timer.start", start)
    totals.add({("n", ()): 2})
    totals.add({("n", ()): 3})
    totals.flush()
    assert sent == [("n", (), 5)]
