"""The sums of an archive's data files: written, and compared before anything reads the files."""

import shutil
import subprocess

import pytest
import torch

from damoyolo.checksums import SUMS_FILE, check_sums, sums_of
from damoyolo.detector import Detector
from damoyolo.errors import CheckpointError
from doubles.tiny_archive import write_tiny_archive


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "damoyolo.pth").write_bytes(b"weights")
    (tmp_path / "damoyolo.onnx").write_bytes(b"network")
    (tmp_path / SUMS_FILE).write_text(sums_of([tmp_path / "damoyolo.pth", tmp_path / "damoyolo.onnx"]))
    return tmp_path


def test_files_as_they_were_written_pass(folder):
    check_sums(folder, "damoyolo.pth")


def test_the_list_is_what_sha256sum_reads(folder):
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not installed")
    checked = subprocess.run(["sha256sum", "--check", "--strict", SUMS_FILE], cwd=folder, capture_output=True)
    assert checked.returncode == 0


@pytest.mark.parametrize("name", ["damoyolo.pth", "damoyolo.onnx"])
def test_a_changed_or_missing_file_is_refused_with_its_name(folder, name):
    (folder / name).write_bytes(b"Weights")
    with pytest.raises(CheckpointError, match=rf"{name} has the SHA-256 .* damaged or was exchanged"):
        check_sums(folder, "damoyolo.pth")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"lists {name}, which cannot be read"):
        check_sums(folder, "damoyolo.pth")


@pytest.mark.parametrize("content", [b"", b"\xff\x00\n", b"0000  damoyolo.onnx\n"])
def test_a_list_without_the_weights_is_refused(folder, content):
    (folder / SUMS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"does not list damoyolo\.pth"):
        check_sums(folder, "damoyolo.pth")


def test_a_detector_checks_its_files_before_it_reads_them(tmp_path, monkeypatch):
    archive = write_tiny_archive(tmp_path / "archive")
    weights = archive / "damoyolo.pth"
    (archive / SUMS_FILE).write_text(sums_of([weights]))
    Detector.from_archive_dir(archive).close()
    # A bit of a weight: every other check would pass.
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was read"))
    with pytest.raises(CheckpointError, match="damaged or was exchanged"):
        Detector.from_archive_dir(archive)
