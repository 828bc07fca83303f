"""The archives of a model in the model store, and the record of deployments."""

import json
import os
import subprocess
import sys
import time
import zipfile

import pytest
import yaml

from lib.archive.members import MANIFEST_FILE, read_manifest, read_settings
from lib.cli import ScriptError
from lib.deploy.store import ArchiveStore, Record, free_version


def write_archive(path, version="1.0", **settings):
    manifest = {"model": {"modelName": "m", "modelVersion": version, "handler": "h.py"}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST_FILE, json.dumps(manifest))
        archive.writestr("model-config.yaml", yaml.safe_dump({"batchSize": 8, "handler": {}, **settings}))
        archive.writestr("weights", b"w" * 1000)
    return path


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    return ArchiveStore(folder, "m")


@pytest.mark.parametrize(
    ("wanted", "taken", "free"),
    [
        ("1.0", [], "1.0"),
        ("1.0", ["1.0", None], "1.1"),
        ("1.9", ["1.9", "1.10"], "1.11"),
        ("7", ["7"], "8"),
        ("release", ["release"], "release.1"),
        ("v2-rc9", ["v2-rc9"], "v2-rc10"),
    ],
)
def test_a_version_that_is_taken_is_followed_by_the_next_free_one(wanted, taken, free):
    assert free_version(wanted, taken) == free


def test_an_added_archive_has_the_version_and_the_workers_and_room_in_the_queue(store, tmp_path):
    source = write_archive(tmp_path / "new.mar", jobQueueSize=10)
    added = store.add(source, "3.1", workers=16)
    assert added == store.folder / "m_3.1.mar"
    assert read_manifest(added)["model"]["modelVersion"] == "3.1"
    settings = read_settings(added)
    assert (settings["minWorkers"], settings["maxWorkers"], settings["jobQueueSize"]) == (16, 16, 4 * 8 * 16)
    assert sorted(path.name for path in store.folder.iterdir()) == ["m_3.1.mar"]


def test_what_is_no_archive_leaves_nothing_in_the_store(store, tmp_path):
    (tmp_path / "new.mar").write_bytes(b"PK\x03\x04")
    with pytest.raises(ScriptError, match="cannot read the archive"):
        store.add(tmp_path / "new.mar", "2.0", workers=1)
    assert list(store.folder.iterdir()) == []


def test_the_served_archive_is_packed_from_the_folder_of_its_worker(store, tmp_path):
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(write_archive(store.folder / "m.mar")) as archive:
        archive.extractall(unpacked)
    (unpacked / "__pycache__").mkdir()
    (unpacked / "__pycache__" / "h.pyc").write_bytes(b"")
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=unpacked, stdin=subprocess.PIPE) as worker:
        kept = store.keep_served("1.0", "m.mar", [-1, worker.pid])
        worker.communicate(b"\n")
    assert kept == store.folder / "m_1.0.mar"
    assert store.startup_follows(kept)
    write_archive(store.folder / "m.mar", batchSize=4)  # built again since
    assert not store.startup_follows(kept)


def test_the_folder_of_another_process_is_not_taken_for_the_served_archive(store):
    with pytest.raises(ScriptError, match="on the server's machine"):
        store.keep_served("1.0", "m.mar", [os.getpid()])


def test_a_file_that_was_added_is_kept_as_it_is(store, tmp_path):
    added = store.add(write_archive(tmp_path / "new.mar"), "2.0", workers=1)
    assert store.keep_served("2.0", "m_2.0.mar", []) == added


def test_the_archive_of_the_next_start_is_put_back_and_the_refused_one_kept(store, tmp_path):
    store.add(write_archive(tmp_path / "a.mar"), "1.0", workers=1)
    store.set_startup("1.0")
    assert not store.put_back_startup("1.0")
    refused = write_archive(store.folder / "m.mar", "9.0").read_bytes()
    assert store.put_back_startup("1.0")
    assert read_manifest(store.startup_path)["model"]["modelVersion"] == "1.0"
    assert store.refused_path.read_bytes() == refused
    assert not store.put_back_startup("5.0")  # there is no such archive to put back


def test_the_record_is_read_as_written_and_a_damaged_one_is_named(store):
    assert store.read_record() == Record()
    record = Record(current="2.0", previous="1.0", adding="3.0", replacing="2.0", startup=True)
    store.write_record(record)
    assert store.read_record() == record
    (store.folder / ".m.deploy.json").write_text('{"colour": 1}')
    with pytest.raises(ScriptError, match=r"\.m\.deploy\.json is damaged"):
        store.read_record()


def test_the_lock_names_the_process_that_holds_it_and_ends_with_it(store):
    program = (
        "import sys, time; from pathlib import Path; from lib.deploy.store import ArchiveStore\n"
        "with ArchiveStore(Path(sys.argv[1]), 'm').locked(): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(store.folder)],
        env={"PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(ScriptError, match=f"process {holder.pid}"), store.locked():
            pass
        holder.kill()
        holder.wait()
        deadline = time.monotonic() + 10
        while True:
            try:
                with store.locked():
                    break
            except ScriptError:
                assert time.monotonic() < deadline


@pytest.mark.parametrize("name", ["", "../m", "a b", "x" * 80])
def test_a_model_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ScriptError, match="--model is"):
        ArchiveStore(tmp_path, name)


def test_a_store_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ScriptError, match="--model-store"):
        ArchiveStore(tmp_path / "absent", "m")
