"""Deployments against a management API in memory; tests/integration/test_deploy.py has a real server."""

import dataclasses
import json
import zipfile

import pytest
import yaml

from lib.archive.members import MANIFEST_FILE, read_manifest, read_settings
from lib.cli import ScriptError
from lib.deploy import rollout, waiting
from lib.deploy.golden import Golden
from lib.deploy.rollout import Rollout
from lib.deploy.store import ArchiveStore
from lib.deploy.waiting import Limits
from lib.server.management import ModelVersion, Worker

NAMES = ("a", "b")


def write_archive(path, version="1.0", name="m", workers=1):
    manifest = {"model": {"modelName": name, "modelVersion": version, "handler": "h.py"}}
    settings = {"batchSize": 2, "minWorkers": workers, "maxWorkers": workers, "handler": {}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST_FILE, json.dumps(manifest))
        archive.writestr("model-config.yaml", yaml.safe_dump(settings))
    return path


class Server:
    """Versions with workers that start and end at once; `events` has the changes in order."""

    model_name = "m"

    def __init__(self, folder):
        self.folder, self.registered, self.events = folder, {}, []
        self.refuse = set()  # events that raise
        self.pinned, self.busy, self.dead = 0, False, False

    def change(self, *event):
        self.events.append(event)
        if event[0] in self.refuse:
            raise ScriptError(f"{event[0]} refused")

    def start(self, archive):
        version = read_manifest(self.folder / archive)["model"]["modelVersion"]
        self.registered[version] = (archive, read_settings(self.folder / archive)["minWorkers"])
        return version

    def register(self, archive):
        self.change("register", archive)
        self.start(archive)

    def versions(self):
        return {version: self.version(version) for version in self.registered}

    def version(self, version):
        archive, count = self.registered[version]
        status = "UNLOADING" if self.dead and version == self.default else "READY"
        workers = tuple(Worker(str(i), 1000 + i, status) for i in range(count))
        return ModelVersion(version, archive, count, workers, 2, 0.1, 3 if self.busy else 0)

    def default_version(self):
        return self.default

    def card(self, version, timeout_s=1.0):
        self.turn = (getattr(self, "turn", 0) + 1) % max(1, self.registered[version][1])
        return {"worker_pid": 1000 + self.turn, "class_names": list(NAMES)}

    def pinned_requests(self, version):
        return self.pinned

    def require_registration(self):
        self.change("require_registration")

    def scale(self, version, workers):
        self.change("scale", version, workers)
        self.registered[version] = (self.registered[version][0], workers)

    def set_default(self, version):
        self.change("set_default", version)
        self.default = version

    def unregister(self, version):
        self.change("unregister", version)
        assert self.registered.pop(version)[1] == 0
        assert version != self.default


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    return ArchiveStore(folder, "m")


@pytest.fixture
def server(store, monkeypatch):
    """Serves m_1.0.mar, which m.mar equals."""
    write_archive(store.path("1.0"))
    store.set_startup("1.0")
    server = Server(store.folder)
    server.default = server.start("m_1.0.mar")
    golden = Golden(NAMES, 300, ())
    monkeypatch.setattr(rollout, "compute_golden", lambda *_: golden)
    monkeypatch.setattr(rollout, "check_served", lambda *_: server.change("check") or 4)
    monkeypatch.setattr(waiting, "SETTLE_S", 0.001)
    monkeypatch.setattr(waiting, "POLL_S", 0.001)
    return server


@pytest.fixture
def deploy(server, store, tmp_path):
    """A new Rollout, as every command makes one; its lines go to `deploy.said`."""

    def make(**options):
        limits = Limits(0.2, 0.2, 0.2)
        return Rollout(
            server,
            store,
            "http://x/predictions/m",
            [],
            tmp_path / "log",
            limits,
            say=make.said.append,
            **options,
        )

    make.said = []
    return make


def versions_in(store):
    return sorted(path.name for path in store.folder.glob("*.mar"))


def test_an_update_checks_before_it_switches_and_removes_only_afterwards(server, store, deploy, tmp_path):
    deploy().update(write_archive(tmp_path / "new.mar", "2.0"), None)
    assert server.events == [
        ("require_registration",),
        ("register", "m_2.0.mar"),
        ("check",),
        ("set_default", "2.0"),
        ("scale", "1.0", 0),
        ("unregister", "1.0"),
    ]
    assert read_manifest(store.startup_path)["model"]["modelVersion"] == "2.0"
    assert versions_in(store) == ["m.mar", "m_1.0.mar", "m_2.0.mar"]
    assert store.read_record().previous == "1.0"


def test_an_archive_of_the_served_version_number_gets_the_next_one(server, deploy, tmp_path):
    deploy().update(write_archive(tmp_path / "new.mar", "1.0"), None)
    assert server.default == "1.1"
    assert "version 1.0 of" in deploy.said[0]
    deploy().update(write_archive(tmp_path / "newer.mar", "1.0", workers=7), None)
    # 1.0 is kept, and there are as many workers as before.
    assert server.registered == {"1.2": ("m_1.2.mar", 1)}
    assert any("is for 7 workers and gets 1; --workers" in line for line in deploy.said)


def test_only_the_archive_before_the_last_update_is_kept(server, store, deploy, tmp_path):
    for version in ("2.0", "3.0"):
        deploy().update(write_archive(tmp_path / "new.mar", version), None)
    assert versions_in(store) == ["m.mar", "m_2.0.mar", "m_3.0.mar"]
    deploy().rollback()
    assert (server.default, store.read_record().previous) == ("2.0", "3.0")
    deploy().rollback()
    assert (server.default, store.read_record().previous) == ("3.0", "2.0")
    assert versions_in(store) == ["m.mar", "m_2.0.mar", "m_3.0.mar"]


def test_an_archive_that_is_served_already_is_not_registered_again(server, deploy, tmp_path):
    new = write_archive(tmp_path / "new.mar", "2.0")
    deploy().update(new, None)
    server.events.clear()
    deploy().update(new, None)
    assert server.events == [("require_registration",)]
    deploy().update(new, 2)
    assert server.registered == {"2.1": ("m_2.1.mar", 2)}


def test_another_number_of_workers_is_a_version_of_its_own(server, store, deploy):
    for workers, version in ((3, "1.1"), (2, "1.2")):
        deploy().scale(workers)
        assert server.registered == {version: (f"m_{version}.mar", workers)}
        assert read_settings(store.startup_path)["minWorkers"] == workers
        assert (store.read_record().previous, versions_in(store)) == (None, ["m.mar", f"m_{version}.mar"])
    assert all(event[2] == 0 for event in server.events if event[0] == "scale")  # of the replaced ones
    deploy().scale(2)
    assert deploy.said[-1] == "version 1.2 has 2 workers already"


@pytest.mark.parametrize("step", ["require_registration", "register", "check", "set_default"])
def test_a_step_that_fails_leaves_everything_as_it_was(server, store, deploy, tmp_path, step):
    server.refuse.add(step)
    with pytest.raises(ScriptError, match=f"{step} refused"):
        deploy().update(write_archive(tmp_path / "new.mar", "2.0"), None)
    assert (server.registered, server.default) == ({"1.0": ("m_1.0.mar", 1)}, "1.0")
    assert versions_in(store) == ["m.mar", "m_1.0.mar"]
    assert read_manifest(store.startup_path)["model"]["modelVersion"] == "1.0"
    assert store.read_record().adding is None


@pytest.mark.parametrize("step", ["scale", "unregister"])
def test_what_fails_after_the_switch_is_finished_by_the_next_command(server, store, deploy, tmp_path, step):
    server.refuse.add(step)
    with pytest.raises(ScriptError, match=f"{step} refused"):
        deploy().update(write_archive(tmp_path / "new.mar", "2.0"), None)
    assert server.default == "2.0"
    server.refuse.clear()
    deploy().scale(1)
    assert (list(server.registered), store.read_record().previous) == (["2.0"], "1.0")
    assert read_manifest(store.startup_path)["model"]["modelVersion"] == "2.0"


def test_a_refused_rollback_keeps_its_archive(server, store, deploy, tmp_path):
    deploy().update(write_archive(tmp_path / "new.mar", "2.0"), None)
    server.refuse.add("check")
    with pytest.raises(ScriptError, match="check refused"):
        deploy().rollback()
    server.refuse.clear()
    deploy().rollback()
    assert server.default == "1.0"


def test_without_an_update_there_is_nothing_to_roll_back_to(deploy):
    with pytest.raises(ScriptError, match="keeps no earlier archive"):
        deploy().rollback()


def test_other_classes_need_an_option(server, deploy, tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "compute_golden", lambda *_: Golden(("a", "c"), 300, ()))
    new = write_archive(tmp_path / "new.mar", "2.0")
    with pytest.raises(ScriptError, match="are a, c, those of the served version a, b; --new-classes"):
        deploy().update(new, None)
    deploy(new_classes=True).update(new, None)
    assert server.default == "2.0"


def test_an_archive_of_another_model_is_refused_before_anything_is_touched(server, deploy, tmp_path):
    with pytest.raises(ScriptError, match="--model m"):
        deploy().update(write_archive(tmp_path / "new.mar", name="other"), None)
    assert server.events == []


def test_a_version_that_does_not_get_idle_is_removed_only_on_demand(server, deploy, tmp_path):
    server.busy = True
    with pytest.raises(ScriptError, match="is not idle"):
        deploy().update(write_archive(tmp_path / "new.mar", "2.0"), None)
    assert set(server.registered) == {"1.0", "2.0"}
    with pytest.raises(ScriptError, match="is not idle"):
        deploy().scale(1)
    deploy(discard=True).scale(1)
    assert set(server.registered) == {"2.0"}


def test_a_version_whose_workers_do_not_start_can_be_replaced(server, store, deploy, tmp_path):
    # As at a start with a damaged m.mar: there is no folder of a worker to keep the archive from.
    server.registered = {"1.0": ("m.mar", 1)}
    server.dead = True
    store.path("1.0").unlink()
    deploy().update(write_archive(tmp_path / "new.mar", "2.0"), None)
    assert list(server.registered) == ["2.0"]
    assert read_manifest(store.startup_path)["model"]["modelVersion"] == "2.0"
    with pytest.raises(ScriptError, match="keeps no earlier archive"):
        deploy().rollback()


def test_another_build_in_place_of_the_startup_archive_is_left_alone(server, store, deploy, tmp_path):
    write_archive(store.startup_path, "1.0", workers=5)
    built = store.startup_path.read_bytes()
    deploy().update(write_archive(tmp_path / "new.mar", "2.0"), None)
    assert store.startup_path.read_bytes() == built
    assert any("is left as it is" in line for line in deploy.said)


def test_a_refused_build_in_place_of_the_startup_archive_is_set_aside(server, store, deploy):
    write_archive(store.startup_path, "1.0", workers=5)
    built = store.startup_path.read_bytes()
    server.refuse.add("check")
    with pytest.raises(ScriptError, match="check refused"):
        deploy().update(store.startup_path, None)
    assert read_settings(store.startup_path)["minWorkers"] == 1
    assert store.refused_path.read_bytes() == built


def test_an_interrupted_update_is_undone_and_the_server_may_have_ended_meanwhile(
    server, store, deploy, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout, "check_served", interrupt)
    with pytest.raises(KeyboardInterrupt):
        deploy().update(write_archive(tmp_path / "new.mar", "2.0"), None)
    assert list(server.registered) == ["1.0"]
    # Killed after the registration, and the server started again since, from m.mar.
    store.write_record(dataclasses.replace(store.read_record(), adding="2.0", replacing="1.0"))
    deploy().scale(1)
    assert store.read_record().adding is None
