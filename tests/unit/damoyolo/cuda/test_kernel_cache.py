"""The Triton kernels that an archive carries: used where they fit, and otherwise ignored."""

import json
import os
from pathlib import Path

import pytest

from damoyolo.cuda.kernel_cache import CACHE_VARIABLE, use_compiled_kernels


@pytest.fixture(autouse=True)
def _no_cache_set(monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, "x")  # so that it is put back afterwards
    monkeypatch.delenv(CACHE_VARIABLE)


def make_group(model_dir):
    kernel_dir = model_dir / "compiled_kernels" / "HASH"
    kernel_dir.mkdir(parents=True)
    (kernel_dir / "stem.cubin").write_bytes(b"code")
    group = kernel_dir / "__grp__stem.json"
    group.write_text(json.dumps({"child_paths": {"stem.cubin": "/elsewhere/HASH/stem.cubin"}}))
    return group


def test_kernels_of_another_machine_are_found_in_their_new_place(tmp_path):
    group = make_group(tmp_path)
    assert use_compiled_kernels(tmp_path)
    (path,) = json.loads(group.read_text())["child_paths"].values()
    assert Path(path).read_bytes() == b"code"
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "compiled_kernels")
    assert [each.name for each in group.parent.iterdir() if each.name.startswith(".")] == []


def test_what_triton_wrote_elsewhere_is_what_it_reads_here(tmp_path, monkeypatch):
    cache = pytest.importorskip("triton.runtime.cache")
    there = tmp_path / "there"
    monkeypatch.setenv(CACHE_VARIABLE, str(there))
    writer = cache.FileCacheManager("HASH")
    path = writer.put(b"code", "stem.cubin")
    writer.put_group("stem.json", {"stem.cubin": path})
    monkeypatch.delenv(CACHE_VARIABLE)
    model_dir = tmp_path / "here"
    model_dir.mkdir()
    there.rename(model_dir / "compiled_kernels")
    assert use_compiled_kernels(model_dir)
    found = cache.FileCacheManager("HASH").get_group("stem.json")
    assert Path(found["stem.cubin"]).read_bytes() == b"code"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"child_paths": 3}'])
def test_a_damaged_folder_is_ignored(tmp_path, text, caplog):
    make_group(tmp_path).write_text(text)
    assert not use_compiled_kernels(tmp_path)
    assert CACHE_VARIABLE not in os.environ
    assert "not used" in caplog.text


def test_a_cache_that_the_operator_names_is_left_alone(tmp_path, monkeypatch):
    group = make_group(tmp_path)
    before = group.read_text()
    monkeypatch.setenv(CACHE_VARIABLE, "/theirs")
    assert not use_compiled_kernels(tmp_path)
    assert group.read_text() == before


def test_an_archive_without_kernels_changes_nothing(tmp_path):
    assert not use_compiled_kernels(tmp_path)
    assert CACHE_VARIABLE not in os.environ
