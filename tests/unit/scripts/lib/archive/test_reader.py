"""Unpacking archives, also such as somebody made to do harm."""

import stat
import zipfile

import pytest

from lib.archive.reader import unpacked
from lib.cli import ScriptError


def test_members_stay_in_the_folder_whatever_their_names_say(tmp_path):
    archive, outside = tmp_path / "evil.mar", tmp_path / "outside"
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("../" * 9 + str(outside)[1:], "by dots")
        opened.writestr(str(outside), "by an absolute path")
        opened.writestr(link, str(outside))
        opened.writestr("link/file", "through a link")
    with pytest.raises(ScriptError), unpacked(archive):  # a file cannot be a folder as well
        pass
    assert not outside.exists()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("../" * 9 + str(outside)[1:], "by dots")
        opened.writestr(link, str(outside))
    with unpacked(archive) as folder:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sorted(path.read_text() for path in files) == sorted(["by dots", str(outside)])
        assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert not outside.exists()
    assert not folder.exists()
