"""Processes measured in turn: the order of the questions, and what happens when one fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.measure import backend_process
from lib.measure.backend_process import Method, WorkerError, measure_in_turn

METHOD = Method((1, 4), rounds=3, slice_s=0.1, images=Path("images"), voc=Path("data"))
# Seconds of a batch in the three rounds; the median is the second.
SECONDS = {
    ("network", 1): [0.1, 0.08, 0.05],
    ("detector", 1): [0.3, 0.1, 0.09],
    ("detector", 4): [0.5, 0.2, 0.1],
}


class StandIn:
    """Answers at once, logs the questions to all processes, and fails as told."""

    log: list[tuple[str, str, int | None]] = []  # noqa: RUF012
    failing: dict[str, str] = {}  # noqa: RUF012
    closed: list[str] = []  # noqa: RUF012

    def __init__(self, folder, device, method):
        self.name = folder.name
        self.asked = {}
        self._answer("load")
        self.started = {"start_s": 1.5, "import_s": 2.0, "resident_mib": 500.0, "runs_in": self.name}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed.append(self.name)

    def _answer(self, question, batch_size=None):
        self.log.append((self.name, question, batch_size))
        if self.failing.get(self.name) == question:
            raise WorkerError("OutOfMemoryError: too large")

    def ask(self, question, **arguments):
        if question != "time":
            self._answer(question)
            return {
                "warm": {"peak_mib": 700.0},
                "agreement": {"score_difference": 0.0, "box_difference_px": 0.0},
                "ap": {"ap": 0.5},
            }[question]
        figure = arguments["part"], arguments["batch_size"]
        self._answer(*figure)
        times = self.asked[figure] = self.asked.get(figure, 0) + 1
        return {"seconds": SECONDS[figure][times - 1]}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(backend_process, "WorkerProcess", StandIn)
    for name, empty in {"log": [], "failing": {}, "closed": []}.items():
        monkeypatch.setattr(StandIn, name, empty)


def measure(*names):
    return measure_in_turn({name: Path(name) for name in names}, "cpu", METHOD, Path("ref"), lambda _: None)


def test_each_round_measures_a_figure_of_every_process_before_the_next_figure():
    measure("a", "b")
    times = [entry for entry in StandIn.log if entry[2] is not None]
    a_round = [
        (name, *figure)
        for figure in (("network", 1), ("detector", 1), ("detector", 4))
        for name in ("a", "b")
    ]
    assert times == 3 * a_round
    # Memory is measured before AP, and all have started before the first is timed.
    assert [question for name, question, _ in StandIn.log[:4]] == ["load", "warm", "agreement", "ap"]
    assert StandIn.log.index(("b", "ap", None)) < StandIn.log.index(times[0])
    assert sorted(StandIn.closed) == ["a", "b"]


def test_figures_are_medians_of_the_rounds():
    row = measure("a")["a"]
    assert row["network_ms"] == pytest.approx(80)
    assert row["detector_ms"] == pytest.approx(100)
    assert row["images_per_s"] == pytest.approx(10)
    assert (row["best_images_per_s"], row["best_batch_size"]) == (pytest.approx(20), 4)
    assert (row["ap"], row["start_s"], row["resident_mib"], row["peak_mib"]) == (0.5, 1.5, 500, 700)
    assert "device_mib" not in row  # on a CPU


@pytest.mark.parametrize("question", ["load", "warm", "ap", "detector"])
def test_a_process_that_fails_is_a_row_not_run_and_the_others_go_on(question):
    StandIn.failing["a"] = question
    rows = measure("a", "b")
    assert rows["a"] == {"not_run": "failed: OutOfMemoryError"}
    assert rows["b"]["detector_ms"] == pytest.approx(100)
    assert len([entry for entry in StandIn.log if entry[:2] == ("a", question)]) == 1  # not asked again
