"""Waiting for versions, with a management API that plays a script."""

import dataclasses

import pytest

from lib.cli import ScriptError
from lib.deploy import waiting
from lib.deploy.waiting import Limits, VersionWaiter
from lib.server.management import ModelVersion, Worker

VERSION = ModelVersion("1.0", "m.mar", 2, (), 8, 0.2, 0)


def workers(*states):
    """Workers by (pid, status)."""
    return tuple(Worker(str(index), pid, status) for index, (pid, status) in enumerate(states))


READY = workers((11, "READY"), (12, "READY"))


class ScriptedManagement:
    """Gives the scripted values one after the other, and the last one for ever; notes the changes."""

    model_name = "m"

    def __init__(self, states=(READY,), cards=(), pinned=(0,), pending=(0,)):
        self.states, self.cards, self.pinned = list(states), list(cards), list(pinned)
        self.pending = list(pending)
        self.changes = []

    def version(self, version):
        state, pending = next_of(self.states), next_of(self.pending)
        return dataclasses.replace(VERSION, workers=state, pending=pending)

    def card(self, version, timeout_s):
        return next_of(self.cards) if self.cards else {}

    def pinned_requests(self, version):
        return next_of(self.pinned)

    def scale(self, version, count):
        self.changes.append(("scale", version, count))

    def unregister(self, version):
        self.changes.append(("unregister", version))


def next_of(values):
    return values.pop(0) if len(values) > 1 else values[0]


@pytest.fixture
def waiter(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "SETTLE_S", 0.01)
    monkeypatch.setattr(waiting, "POLL_S", 0.01)

    def make(**script):
        management = ScriptedManagement(**script)
        return VersionWaiter(management, tmp_path / "log", Limits(0.5, 0.5, 0.5)), management

    return make


def cards(*pids):
    return [{"worker_pid": pid} for pid in pids]


def test_a_version_is_ready_when_all_its_workers_are(waiter):
    starting = workers((11, "READY"), (-1, "UNLOADING"))
    found, _ = waiter(states=[(), starting, workers((11, "READY"), (12, "UNLOADING")), READY])
    assert found.wait_until_ready("1.0", 2).ready_pids == [11, 12]


def test_a_worker_that_starts_a_second_time_has_died(waiter):
    found, _ = waiter(states=[workers((pid, "UNLOADING")) for pid in (-1, 11, 12)])
    with pytest.raises(ScriptError, match=r"died \(wanted 1, there: UNLOADING\)\n.*--server-log"):
        found.wait_until_ready("1.0", 1)


def test_workers_that_take_too_long_are_given_up(waiter):
    found, _ = waiter(states=[workers((11, "UNLOADING"))])
    with pytest.raises(ScriptError, match=r"were not ready within 0\.5 s"):
        found.wait_until_ready("1.0", 1)


def test_a_version_is_idle_when_every_worker_has_answered_from_an_empty_queue(waiter):
    found, management = waiter(cards=cards(11, 11, 11, 12, 99))
    found.wait_until_idle("1.0")
    assert management.cards == cards(99)


def test_a_worker_that_does_not_answer_is_busy(waiter):
    found, _ = waiter(cards=cards(11))
    with pytest.raises(ScriptError, match="requests wait for its workers"):
        found.wait_until_idle("1.0")


def test_requests_that_wait_keep_a_version_busy(waiter):
    found, _ = waiter(cards=cards(11, 12, 11, 12, 11, 12, 99), pending=[3, 3, 3, 0])
    found.wait_until_idle("1.0")
    found, _ = waiter(cards=cards(11, 12) * 100, pending=[3])
    with pytest.raises(ScriptError, match="requests wait for its workers"):
        found.wait_until_idle("1.0")


def test_a_worker_that_has_ended_is_not_waited_for(waiter):
    found, _ = waiter(cards=cards(11), states=[READY, workers((11, "READY"), (12, "UNLOADING"))])
    found.wait_until_idle("1.0")


def test_a_version_whose_clients_name_it_is_not_idle(waiter):
    found, _ = waiter(cards=cards(11, 12) * 500, pinned=range(10_000))
    with pytest.raises(ScriptError, match="clients still name it"):
        found.wait_until_idle("1.0")


def test_an_archive_without_the_pid_in_its_card_gets_the_time_of_a_batch(waiter):
    waited = []
    found, management = waiter()
    management.card = lambda *_, **__: waited.append(1) or {}
    found.wait_until_idle("1.0")
    assert len(waited) > 2


def test_a_version_is_unregistered_only_without_workers(waiter):
    found, management = waiter(states=[READY, READY[:1], ()])
    found.remove("1.0")
    assert management.changes == [("scale", "1.0", 0), ("unregister", "1.0")]
    found, management = waiter()
    with pytest.raises(ScriptError, match="do not end"):
        found.remove("1.0")
    assert management.changes == [("scale", "1.0", 0)]
