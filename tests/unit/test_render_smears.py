"""The renderer of smears: one image per seed, with exact boxes."""

import json

import numpy as np
import pytest
from PIL import Image

from lib.accuracy.datasets import read_coco

from data.smears.render import CellCounts, main, smear, varied_counts


def test_a_seed_always_gives_the_same_image_and_another_seed_another():
    first, first_boxes = smear(5)
    again, again_boxes = smear(5)
    other, _ = smear(6)
    assert first.tobytes() == again.tobytes()
    assert first_boxes == again_boxes
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("size_wh", [(640, 480), (960, 540), (200, 150)])
def test_every_box_lies_in_the_image_and_has_an_area(size_wh):
    image, boxes = smear(1, size_wh, CellCounts(red=8, white=1, platelets=3))
    assert image.size == size_wh
    assert boxes
    for box in boxes:
        assert 0 <= box.x1 < box.x2 <= size_wh[0]
        assert 0 <= box.y1 < box.y2 <= size_wh[1]


def test_there_is_a_cell_where_a_box_says_so():
    image, boxes = smear(2, counts=CellCounts(red=0, white=1, platelets=0))
    (box,) = boxes
    values = np.asarray(image, dtype=np.float32)
    inside = np.zeros(values.shape[:2], bool)
    inside[box.y1 : box.y2, box.x1 : box.x2] = True
    assert box.label == "WBC"
    assert values[inside].mean() < values[~inside].mean() - 20


def test_an_image_too_small_for_a_cell_is_refused():
    with pytest.raises(ValueError, match="128"):
        smear(0, (640, 100))


@pytest.mark.parametrize("seed", [3, 4, 7])
def test_the_sample_smears_are_those_of_their_seeds(project_dir, seed):
    samples = project_dir / "tests" / "data" / "smears"
    image, boxes = smear(seed, counts=varied_counts(seed))
    expected = json.loads((samples / f"smear_{seed}.json").read_text())
    assert [box.label for box in boxes] == [entry[0] for entry in expected]
    # On other processors a pixel of an outline may be rounded to the other side.
    assert (
        np.abs(np.array([box[1:] for box in boxes]) - np.array([entry[1:] for entry in expected])).max() <= 1
    )
    with Image.open(samples / f"smear_{seed}.jpg") as sample:
        difference = np.asarray(image, dtype=np.float32) - np.asarray(sample, dtype=np.float32)
    assert np.abs(difference).mean() < 2  # JPEG alone makes about 1


def test_what_it_writes_is_a_data_set(tmp_path):
    assert main([str(tmp_path), "--count", "2", "--first-seed", "10", "--size", "320", "240"]) == 0
    dataset = read_coco(tmp_path / "annotations.json", tmp_path)
    assert [image.path.name for image in dataset.images] == ["smear_10.jpg", "smear_11.jpg"]
    assert dataset.object_count > 0
    for image in dataset.images:
        with Image.open(image.path) as opened:
            assert opened.size == (320, 240)


def test_the_annotations_of_the_samples_are_those_of_their_boxes(project_dir, tmp_path):
    samples = project_dir / "tests" / "data" / "smears"
    for path in samples.glob("smear_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert main([str(tmp_path), "--annotate"]) == 0
    assert (tmp_path / "annotations.json").read_text() == (samples / "annotations.json").read_text()


def test_a_size_it_cannot_draw_is_a_usage_error(tmp_path):
    for size in (["100", "100"], ["640"], ["0", "480"]):
        with pytest.raises(SystemExit) as exit_info:
            main([str(tmp_path), "--size", *size])
        assert exit_info.value.code == 2
