"""Settings measured with a stand-in in place of the TorchServe that each starts."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from lib.archive.members import BatchingSetting
from lib.cli import ScriptError
from lib.load.worker import Load
from lib.measure import served_setting
from lib.measure.served_setting import SettingMeasurer
from lib.server.served_archive import ServedModel

from doubles.stand_in_server import StandInModel

LOAD = Load("", [b"image"], 1, warm_up_s=0.05, duration_s=0.2, timeout_s=5.0, processes=1)


@contextmanager
def stand_in(_archive, setting, _environment):
    if setting.workers > 1:
        raise ScriptError("a worker could not start:\nout of memory")
    with StandInModel() as model:
        yield ServedModel(model.base_url, model.base_url, model.base_url, "m")


@pytest.mark.parametrize(("budget_ms", "meets"), [(1000.0, True), (1.0, False)])
def test_fewer_requests_are_in_flight_only_where_the_budget_needs_it(monkeypatch, budget_ms, meets):
    monkeypatch.setattr(served_setting, "serve_with_setting", stand_in)
    reports = []
    with SettingMeasurer(Path("m.mar"), LOAD, budget_ms, reports.append) as measure:
        measured = measure(BatchingSetting(2, 1, 1))
    assert measured.errors == 0
    assert measured.requests_per_s > 20
    assert measured.meets(budget_ms) == meets
    assert measured.concurrency == 4 or not meets
    assert ("over the budget" in reports[0]) != meets


def test_a_setting_that_does_not_start_fails_alone(monkeypatch):
    monkeypatch.setattr(served_setting, "serve_with_setting", stand_in)
    reports = []
    with SettingMeasurer(Path("m.mar"), LOAD, 1000.0, reports.append) as measure:
        assert measure(BatchingSetting(2, 1, 2)).errors
        assert not measure(BatchingSetting(2, 1, 1)).errors
    assert "does not start (out of memory)" in reports[0]
