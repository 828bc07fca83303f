"""Loads on a stand-in model, and what is made of their rows."""

import pytest

from lib.load.worker import Load
from lib.measure.served_load import (
    LoadPlan,
    add_empty_limit,
    add_network_limit,
    add_scaling,
    best_rate,
    measure_plan,
    warnings_about,
)
from lib.server import metrics
from lib.server.served_archive import ServedModel

from doubles.stand_in_server import StandInModel

BASE = Load("", [b"image"], 1, warm_up_s=0.05, duration_s=0.4, timeout_s=5.0, processes=1)


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(metrics, "COUNTERS_LAG_S", 0.0)
    with StandInModel() as model:
        yield ServedModel(model.base_url, model.base_url, model.base_url, "m")


def test_the_plan_gives_a_row_per_load_and_open_loops_at_shares_of_the_best(served):
    seen = []
    plan = LoadPlan(BASE, concurrencies=[1, 4], rates_per_s=[30.0], rate_shares=[0.5])
    rows = measure_plan(served, plan, lambda row: seen.append(row["load"]))
    best = best_rate(rows)
    assert [row["load"] for row in rows] == seen
    assert seen[:3] == ["closed 1", "closed 4", "open 30/s"]
    assert rows[1]["requests_per_s"] == best > 1.5 * rows[0]["requests_per_s"]
    assert rows[3]["rate_per_s"] == pytest.approx(best / 2)
    assert rows[3]["connections"] == 64
    for row in rows:
        assert row["errors"] == 0
        assert row["mean_batch_size"] == pytest.approx(4)
        assert row["stage_ms"] == {"network": pytest.approx(5)}
        assert row["p50_ms"] >= 10


def test_without_requests_there_is_no_mean_batch_size(served):
    with metrics.CounterWindow(served.metrics_url, "m") as counters:
        pass
    assert counters.mean_batch_size is None
    assert counters.stage_ms == {}


def test_rows_stand_beside_both_limits_where_these_are_known():
    def row(gpus, connections, requests_per_s, rate_per_s=None, errors=0):
        values = {"requests_per_s": requests_per_s, "rate_per_s": rate_per_s, "errors": errors}
        return {"gpus": gpus, "connections": connections, **values}

    rows = [row(None, 8, 90.0), row(None, 9, 90.0), row(None, 8, 50.0, rate_per_s=50.0), row(2, 8, 90.0)]
    for each in rows:
        add_network_limit(each, 100.0)
    add_empty_limit(rows, [row(None, 8, 900.0), row(None, 9, 900.0, errors=1), row(2, 8, 1800.0)])
    assert [each["of_network"] for each in rows] == [0.9, 0.9, 0.5, 0.45]
    assert [each["of_empty"] for each in rows] == [0.1, None, None, 0.05]
    add_network_limit(rows[0], None)
    add_empty_limit(rows, [])
    assert rows[0]["of_network"] is rows[0]["of_empty"] is None


def test_several_gpus_get_the_load_of_one_several_times():
    plan = LoadPlan(BASE, concurrencies=[8, 32], rates_per_s=[100.0], rate_shares=[0.7]).for_gpus(4)
    assert (plan.concurrencies, plan.rates_per_s, plan.rate_shares) == ([32, 128], [400.0], [0.7])
    assert (plan.base.processes, plan.gpus) == (4, 4)


def test_rates_stand_beside_the_mean_of_one_gpu_with_the_same_load_per_gpu():
    def row(gpus, connections, requests_per_s):
        rate_per_s = None if connections else 50.0
        values = {"connections": connections, "requests_per_s": requests_per_s, "rate_per_s": rate_per_s}
        return {"gpus": gpus, **values}

    rows = [row(1, 8, 90.0), row(2, 16, 190.0), row(2, 32, 190.0), row(1, 8, 110.0), row(2, 0, 50.0)]
    add_scaling(rows)
    assert [row["of_one_gpu"] for row in rows] == [0.9, 1.9, None, 1.1, None]


@pytest.mark.parametrize(
    ("workers", "uneven"), [({"0": 2, "1": 2}, 0), ({}, 0), ({"0": 3, "1": 1}, 1), ({"0": 4}, 1)]
)
def test_workers_that_are_not_spread_evenly_give_a_warning(workers, uneven):
    row = {"load": "closed 8", "generator_busy_share": 0.2, "errors": 0, "gpus": 2}
    assert len(warnings_about([{**row, "workers_per_gpu": workers}])) == uneven


def test_a_busy_generator_and_errors_give_warnings():
    calm = {"load": "calm", "generator_busy_share": 0.2, "errors": 0}
    busy = {**calm, "load": "busy", "generator_busy_share": 0.97}
    counts = {"statuses": {"503": 3}, "connection_errors": {}, "timeouts": 0, "dropped": 0}
    of_busy, of_failed = warnings_about([calm, busy, {**calm, "load": "failed", "errors": 3, **counts}])
    assert "busy: " in of_busy
    assert "97%" in of_busy
    assert "'503': 3" in of_failed


def test_the_best_rate_is_of_closed_loops_without_errors():
    rows = [
        {"requests_per_s": 5.0, "rate_per_s": None, "errors": 0},
        {"requests_per_s": 9.0, "rate_per_s": None, "errors": 1},
        {"requests_per_s": 9.0, "rate_per_s": 9.0, "errors": 0},
    ]
    assert best_rate(rows) == 5.0
    assert best_rate([]) == 0.0
