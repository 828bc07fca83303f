"""The command that adds compiled kernels to an archive, with a program in place of the compilation."""

import zipfile

import pytest

import precompile_kernels


def fake_archive(folder):
    path = folder / "model.mar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights", b"12")
        archive.writestr("compiled_kernels/OLD/old.cubin", b"old")
    return path


def test_compiled_kernels_take_the_place_of_older_ones(tmp_path, monkeypatch, capsys):
    archive = fake_archive(tmp_path)
    program = (
        "import os, pathlib; kernels = pathlib.Path(os.environ['TRITON_CACHE_DIR']) / 'NEW'; "
        "kernels.mkdir(parents=True); code = pathlib.Path('weights').read_bytes(); "
        "(kernels / 'new.cubin').write_bytes(code)"
    )
    monkeypatch.setattr(precompile_kernels, "COMPILE", program)
    assert precompile_kernels.main([str(archive)]) == 0
    assert "1 files of compiled kernels added" in capsys.readouterr().out
    with zipfile.ZipFile(archive) as opened:
        assert sorted(opened.namelist()) == ["compiled_kernels/NEW/new.cubin", "weights"]
        assert opened.read("compiled_kernels/NEW/new.cubin") == b"12"
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('no such device')", "no such device"),
        ("pass", "compiled nothing"),
        ("import time; time.sleep(60)", "was not ready on cuda in 2 s"),
    ],
)
def test_an_archive_that_gives_no_kernels_is_left_as_it_was(tmp_path, monkeypatch, capsys, program, message):
    archive = fake_archive(tmp_path)
    before = archive.read_bytes()
    monkeypatch.setattr(precompile_kernels, "COMPILE", program)
    if "sleep" in program:
        monkeypatch.setattr(precompile_kernels, "COMPILE_TIMEOUT_S", 2.0)
    assert precompile_kernels.main([str(archive)]) == 1
    assert message in capsys.readouterr().err
    assert archive.read_bytes() == before


def test_a_file_that_is_no_archive_is_refused(tmp_path, capsys):
    (tmp_path / "model.mar").write_bytes(b"nothing")
    assert precompile_kernels.main([str(tmp_path / "model.mar")]) == 1
    err = capsys.readouterr().err
    assert "cannot read the archive" in err
    assert "model.mar" in err
