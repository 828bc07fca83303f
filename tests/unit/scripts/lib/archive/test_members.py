"""Copies of archives with members replaced."""

import random
import zipfile

import pytest

from lib.archive.members import (
    MANIFEST_FILE,
    batching_of,
    check_archive,
    copy_archive,
    read_manifest,
    read_settings,
)
from lib.cli import ScriptError

from doubles.echo_handler import write_echo_archive


def test_members_are_replaced_added_and_left_out_and_the_others_copied(tmp_path):
    source = tmp_path / "a.mar"
    with zipfile.ZipFile(source, "w") as archive:
        for name in ("kept", "replaced", "left out"):
            archive.writestr(name, f"old {name}")
    replaced = {"replaced": b"new", "added": b"more", "left out": None, "absent": None}
    copy = copy_archive(source, tmp_path / "b.mar", replaced)
    with zipfile.ZipFile(copy) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    assert content == {"kept": b"old kept", "replaced": b"new", "added": b"more"}


@pytest.mark.parametrize("content", [None, b"", b"no zip", b"PK\x03\x04"])
def test_a_file_that_is_no_archive_is_named(tmp_path, content):
    path = tmp_path / "broken.mar"
    if content is not None:
        path.write_bytes(content)
    for read in (read_settings, read_manifest):
        with pytest.raises(ScriptError, match=r"cannot read the archive .*broken\.mar"):
            read(path)
    with pytest.raises(ScriptError, match="cannot read the archive"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"a: [b: {",
        b"- 1",
        b"",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"handler: text",
        b"a: !!python/name:os.system",
    ],
)
def test_settings_that_are_not_settings_are_refused_in_one_line(tmp_path, text):
    with zipfile.ZipFile(tmp_path / "a.mar", "w") as archive:
        archive.writestr("model-config.yaml", text)
    with pytest.raises(ScriptError, match=r"model-config\.yaml of .*a\.mar") as caught:
        read_settings(tmp_path / "a.mar")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[]", b'{"model": {}}', b"[" * 500_000])
def test_a_manifest_without_a_model_is_refused(tmp_path, text):
    with zipfile.ZipFile(tmp_path / "a.mar", "w") as archive:
        archive.writestr(MANIFEST_FILE, text)
    with pytest.raises(ScriptError, match="names no model"):
        read_manifest(tmp_path / "a.mar")


def test_a_missing_member_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.mar", "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(ScriptError, match=r"no item named 'model-config\.yaml'"):
        read_settings(tmp_path / "a.mar")


@pytest.mark.parametrize("value", [None, "8", True])
def test_batching_settings_that_are_no_numbers_are_named(value):
    with pytest.raises(ScriptError, match=r"maxBatchDelay of model-config\.yaml is"):
        batching_of({"batchSize": 8, "maxBatchDelay": value, "minWorkers": 1})


def test_any_changed_or_missing_byte_is_accepted_or_refused_with_the_name_of_the_archive(tmp_path):
    write_echo_archive(tmp_path / "whole.mar", "echo")
    whole = (tmp_path / "whole.mar").read_bytes()
    check_archive(tmp_path / "whole.mar")
    rng, damaged, messages = random.Random(0), tmp_path / "damaged.mar", []
    for number in range(400):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        damaged.write_bytes(content[: rng.randrange(len(content)) if number % 4 == 0 else None])
        try:
            check_archive(damaged)
        except ScriptError as error:
            messages.append(str(error))
    # What changes only a time stamp, say, is no damage.
    assert len(messages) > 350
    assert all(str(damaged) in message for message in messages)
