"""Real processes that measure an archive: whose modules they run, what they answer, how they fail."""

import pytest

from lib.measure.backend_process import Method, WorkerError, WorkerProcess, measure_in_turn, write_reference
from lib.paths import SAMPLE_IMAGES

from doubles.tiny_archive import write_tiny_archive

METHOD = Method((1, 2), rounds=2, slice_s=0.01, images=SAMPLE_IMAGES, threads=1)


@pytest.mark.slow
def test_an_archive_is_measured_beside_one_that_cannot_be_loaded(tmp_path):
    folders = {name: write_tiny_archive(tmp_path / name) for name in ("whole", "broken")}
    (folders["broken"] / "damoyolo.pth").unlink()
    images = [path.read_bytes() for path in sorted(SAMPLE_IMAGES.glob("*.jpg"))]
    write_reference(tmp_path / "reference.pt", folders["whole"], "cpu", images)
    said = []
    rows = measure_in_turn(folders, "cpu", METHOD, tmp_path / "reference.pt", said.append)

    assert rows["broken"]["not_run"] in ("failed: CheckpointError", "failed: FileNotFoundError")
    assert "damoyolo.pth" in "".join(said)
    row = rows["whole"]
    assert row["runs_in"] == "pytorch fp32"
    assert row["score_difference"] < 1e-5
    assert row["detector_ms"] == pytest.approx(1e3 / row["images_per_s"])
    assert row["best_images_per_s"] == max(row["images_per_s_by_batch_size"].values())
    assert 100 < row["resident_mib"] <= row["peak_mib"]
    assert row["start_s"] > 0
    assert row["import_s"] > 0


def test_the_archives_modules_come_first_and_a_process_that_ends_says_what_it_printed(tmp_path):
    (tmp_path / "damoyolo").mkdir()
    (tmp_path / "damoyolo" / "__init__.py").touch()
    (tmp_path / "damoyolo" / "detector.py").write_text("import os; os.write(2, b'last words'); os._exit(3)")
    with pytest.raises(WorkerError, match=r"(?s)status 3.*last words") as raised:
        WorkerProcess(tmp_path, "cpu", METHOD)
    assert raised.value.kind == "process ended"
