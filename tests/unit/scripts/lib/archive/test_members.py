"""Copies of archives with members replaced."""

from __future__ import annotations

import zipfile
from pathlib import Path

from lib.archive.members import copy_archive


def test_members_are_replaced_added_and_left_out_and_the_others_copied(tmp_path: Path) -> None:
    source = tmp_path / "a.mar"
    with zipfile.ZipFile(source, "w") as archive:
        for name in ("kept", "replaced", "left out"):
            archive.writestr(name, f"old {name}")
    replaced = {"replaced": b"new", "added": b"more", "left out": None, "absent": None}
    copy = copy_archive(source, tmp_path / "b.mar", replaced)
    with zipfile.ZipFile(copy) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    assert content == {"kept": b"old kept", "replaced": b"new", "added": b"more"}
