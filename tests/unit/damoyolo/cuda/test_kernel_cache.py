from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

import precompile_kernels
from damoyolo.cuda.kernel_cache import CACHE_VARIABLE, use_compiled_kernels
from precompile_kernels import CompileError


@pytest.fixture(autouse=True)
def _no_cache_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "x")  # so that it is put back afterwards
    monkeypatch.delenv(CACHE_VARIABLE)


def make_group(model_dir: Path) -> Path:
    kernel_dir = model_dir / "compiled_kernels" / "HASH"
    kernel_dir.mkdir(parents=True)
    (kernel_dir / "stem.cubin").write_bytes(b"code")
    group = kernel_dir / "__grp__stem.json"
    group.write_text(json.dumps({"child_paths": {"stem.cubin": "/elsewhere/HASH/stem.cubin"}}))
    return group


def test_kernels_of_another_machine_are_found_where_they_lie_now(tmp_path: Path) -> None:
    import os

    group = make_group(tmp_path)
    assert use_compiled_kernels(tmp_path)
    (path,) = json.loads(group.read_text())["child_paths"].values()
    assert Path(path).read_bytes() == b"code"
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "compiled_kernels")
    assert [each.name for each in group.parent.iterdir() if each.name.startswith(".")] == []


def test_what_triton_wrote_elsewhere_is_what_it_reads_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_a_damaged_folder_is_left_out_of_account(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    import os

    make_group(tmp_path).write_text(text)
    assert not use_compiled_kernels(tmp_path)
    assert CACHE_VARIABLE not in os.environ
    assert "not used" in caplog.text


def test_a_cache_that_the_operator_names_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_group(tmp_path)
    before = group.read_text()
    monkeypatch.setenv(CACHE_VARIABLE, "/theirs")
    assert not use_compiled_kernels(tmp_path)
    assert group.read_text() == before


def test_an_archive_without_kernels_changes_nothing(tmp_path: Path) -> None:
    import os

    assert not use_compiled_kernels(tmp_path)
    assert CACHE_VARIABLE not in os.environ


def fake_archive(folder: Path) -> Path:
    path = folder / "model.mar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights", b"12")
        archive.writestr("compiled_kernels/OLD/old.cubin", b"old")
    return path


def test_compiled_kernels_take_the_place_of_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = fake_archive(tmp_path)
    program = (
        "import os, pathlib; kernels = pathlib.Path(os.environ['TRITON_CACHE_DIR']) / 'NEW'; "
        "kernels.mkdir(parents=True); code = pathlib.Path('weights').read_bytes(); "
        "(kernels / 'new.cubin').write_bytes(code)"
    )
    monkeypatch.setattr(precompile_kernels, "COMPILE", program)
    assert precompile_kernels.precompile_kernels(archive, "cuda") == 1
    with zipfile.ZipFile(archive) as opened:
        assert sorted(opened.namelist()) == ["compiled_kernels/NEW/new.cubin", "weights"]
        assert opened.read("compiled_kernels/NEW/new.cubin") == b"12"
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize(
    ("program", "message"),
    [("raise SystemExit('no such device')", "no such device"), ("pass", "compiled nothing")],
)
def test_an_archive_that_gives_no_kernels_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    archive = fake_archive(tmp_path)
    before = archive.read_bytes()
    monkeypatch.setattr(precompile_kernels, "COMPILE", program)
    with pytest.raises(CompileError, match=message):
        precompile_kernels.precompile_kernels(archive, "cuda")
    assert archive.read_bytes() == before
