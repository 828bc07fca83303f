"""Data sets in both formats, and what is wrong with them."""

import json

import pytest

from lib.accuracy.datasets import AnnotatedObject, read_coco, read_dataset, read_voc
from lib.cli import ScriptError


def write_voc(folder, objects, split="test"):
    """A data set in Pascal VOC format; objects: of each image, (name, box_xyxy, difficult)."""
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in objects))
    for stem, entries in objects.items():
        (folder / "JPEGImages" / f"{stem}.jpg").write_bytes(b"image")
        xml = "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>"
            f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
            for name, box, difficult in entries
        )
        text = f"<annotation><filename>{stem}.jpg</filename>{xml}</annotation>"
        (folder / "Annotations" / f"{stem}.xml").write_text(text)
    return folder


def write_coco(folder, **changes):
    """A data set in COCO format with one image, images lying in `folder`; changes: top-level keys."""
    (folder / "a.jpg").write_bytes(b"image")
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "categories": [{"id": 3, "name": "RBC"}, {"id": 90, "name": "WBC"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 40]},
            {"id": 2, "image_id": 7, "category_id": 90, "bbox": [0, 0, 5.5, 6.5], "iscrowd": 1},
        ],
        **changes,
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_voc_boxes_are_unchanged_and_difficult_ones_are_ignored(tmp_path):
    folder = write_voc(
        tmp_path / "cells", {"a": [("WBC", (1, 2, 30, 40), 0)], "b": [("RBC", (5, 5, 9, 9), 1)], "c": []}
    )
    dataset = read_voc(folder, "test")
    assert dataset.name == "cells:test"
    assert dict(dataset.class_names) == {1: "RBC", 2: "WBC"}
    assert [image.path.name for image in dataset.images] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [image.objects for image in dataset.images] == [
        (AnnotatedObject(2, (1, 2, 30, 40)),),
        (AnnotatedObject(1, (5, 5, 9, 9), ignored=True),),
        (),
    ]


def test_coco_boxes_become_corners_and_crowds_are_ignored(tmp_path):
    dataset = read_coco(write_coco(tmp_path), tmp_path)
    assert dict(dataset.class_names) == {3: "RBC", 90: "WBC"}
    (image,) = dataset.images
    assert (image.image_id, image.path) == (7, tmp_path / "a.jpg")
    assert image.objects == (
        AnnotatedObject(3, (10, 20, 40, 60)),
        AnnotatedObject(90, (0, 0, 5.5, 6.5), ignored=True),
    )


def test_objects_under_two_pixels_are_dropped_and_counted(tmp_path):
    boxes = [(0, 0, 1, 50), (0, 0, 50, 1), (4, 4, 4, 4), (9, 9, 5, 5), (0, 0, 2, 2)]
    folder = write_voc(tmp_path / "cells", {"a": [("RBC", box, 0) for box in boxes]})
    dataset = read_voc(folder, "test")
    assert dataset.dropped_objects == 4
    assert dataset.object_count == 1
    assert dataset.images[0].objects[0].box_xyxy == (0, 0, 2, 2)


def test_a_missing_split_is_refused_with_the_existing_ones(tmp_path):
    with pytest.raises(ScriptError, match=r"no split 'tset'.*there are: test"):
        read_voc(write_voc(tmp_path / "cells", {}), "tset")


def test_missing_images_are_counted_and_one_is_named(tmp_path):
    folder = write_voc(tmp_path / "cells", {"a": [], "b": []})
    (folder / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(ScriptError, match=r"1 of 2 images .*b\.jpg"):
        read_voc(folder, "test")


@pytest.mark.parametrize("text", ["", "<annotation>", "<annotation><object><bndbox/></object></annotation>"])
def test_a_broken_voc_annotation_is_named(tmp_path, text):
    folder = write_voc(tmp_path / "cells", {"a": []})
    (folder / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(ScriptError, match=r"a\.xml"):
        read_voc(folder, "test")


@pytest.mark.parametrize("side", ["ten", "nan", "inf", ""])
def test_a_box_side_that_is_no_number_is_refused(tmp_path, side):
    folder = write_voc(tmp_path / "cells", {"a": [("RBC", (1, 2, side, 4), 0)]})
    with pytest.raises(ScriptError, match=r"a\.xml"):
        read_voc(folder, "test")


@pytest.mark.parametrize(
    "changes",
    [
        {"annotations": [{"image_id": 8, "category_id": 3, "bbox": [0, 0, 9, 9]}]},
        {"annotations": [{"image_id": 7, "category_id": 4, "bbox": [0, 0, 9, 9]}]},
        {"annotations": [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 9]}]},
        {"annotations": [{"image_id": 7, "category_id": 3}]},
        {"images": None},
        {"categories": [{"id": 3}]},
        {"categories": [{"id": 3, "name": "RBC"}, {"id": 90, "name": "rbc"}]},
        {"images": [{"id": 7, "file_name": "absent.jpg"}]},
        {"images": [{"id": float("inf"), "file_name": "a.jpg"}]},
        {"images": ["a.jpg"]},
        {"annotations": {"a": 1}},
        {"annotations": [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 1e300, 1e300]}]},
        {"annotations": [{"image_id": 7, "category_id": 3, "bbox": "none"}]},
        {"annotations": [{"image_id": [7], "category_id": 3, "bbox": [0, 0, 9, 9]}]},
    ],
)
def test_a_coco_file_that_contradicts_itself_is_refused(tmp_path, changes):
    with pytest.raises(ScriptError, match="instances"):
        read_coco(write_coco(tmp_path, **changes), tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "\x00", "[" * 500_000])
def test_a_file_that_is_no_coco_file_is_refused(tmp_path, text):
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(ScriptError, match=r"instances\.json"):
        read_coco(path, tmp_path)


@pytest.mark.parametrize(
    "file_name", ["/etc/passwd", "../secret.jpg", "x/../../secret.jpg", "link.jpg", "folder/secret.jpg"]
)
def test_a_coco_file_cannot_have_files_outside_its_folder_sent(tmp_path, file_name):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    images = tmp_path / "images"
    images.mkdir()
    (images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "folder").symlink_to(tmp_path)
    path = write_coco(images, images=[{"id": 7, "file_name": file_name}])
    with pytest.raises(ScriptError, match=r"is not inside .*images"):
        read_coco(path, images)


@pytest.mark.parametrize("file_name", ["a\x00b.jpg", "a" * 5000, "loop.jpg"])
def test_a_file_name_that_no_file_can_have_is_refused(tmp_path, file_name):
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    with pytest.raises(ScriptError, match=r"is not the name of a file|are missing"):
        read_coco(write_coco(tmp_path, images=[{"id": 7, "file_name": file_name}]), tmp_path)


def test_an_image_folder_that_is_itself_a_link_is_accepted(tmp_path):
    (tmp_path / "real").mkdir()
    path = write_coco(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(read_coco(path, tmp_path / "link").images) == 1


@pytest.mark.parametrize("what", ["filename", "stem"])
def test_a_voc_data_set_cannot_have_files_outside_its_folder_read_or_sent(tmp_path, what):
    folder = write_voc(tmp_path / "cells", {"a": []})
    (tmp_path / "x.xml").write_text("<annotation/>")
    if what == "stem":
        (folder / "ImageSets" / "Main" / "test.txt").write_text("../../x\n")
    else:
        (folder / "JPEGImages" / "a.jpg").unlink()
        text = "<annotation><filename>/etc/passwd</filename></annotation>"
        (folder / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(ScriptError, match="is not inside"):
        read_voc(folder, "test")


ENTITIES = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
BOMB = f'<!DOCTYPE a [<!ENTITY e0 "ha">{ENTITIES}]><annotation><filename>&e11;</filename></annotation>'


@pytest.mark.parametrize(
    "content",
    [
        BOMB.encode(),
        b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
        '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a><annotation/>'.encode("utf-16"),
        b'<?xml version="1.0" encoding="klingon"?><annotation/>',
        b"<annotation>\xff</annotation>",
        b"\x00" * 100,
    ],
)
def test_a_voc_annotation_with_entities_or_an_unknown_encoding_is_refused_at_once(tmp_path, content):
    folder = write_voc(tmp_path / "cells", {"a": []})
    (folder / "Annotations" / "a.xml").write_bytes(content)
    with pytest.raises(ScriptError, match=r"cannot read the Pascal VOC annotation .*a\.xml"):
        read_voc(folder, "test")


def test_a_list_of_images_that_is_no_text_is_named(tmp_path):
    folder = write_voc(tmp_path / "cells", {"a": []})
    (folder / "ImageSets" / "Main" / "test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ScriptError, match=r"test\.txt is not text in UTF-8"):
        read_voc(folder, "test")


def test_the_evaluation_images_are_read_whole(shared_dir):
    dataset = read_voc(shared_dir / "bccd", "test")
    assert len(dataset.images) == 72
    assert set(dataset.class_names.values()) == {"Platelets", "RBC", "WBC"}
    assert dataset.object_count == 945
    assert read_voc(shared_dir / "bccd", "trainval").dropped_objects > 0


def test_a_command_gets_the_data_set_that_its_options_name(tmp_path):
    voc, coco = write_voc(tmp_path / "cells", {"a": []}), write_coco(tmp_path)
    for options, name in (
        ((None, "test", None, None), None),
        ((voc, "test", None, None), "cells:test"),
        ((None, "test", coco, tmp_path), "instances"),
        ((None, "test", coco, None), "instances"),  # with the images beside it
    ):
        dataset = read_dataset(*options)
        assert (None if dataset is None else dataset.name) == name
    with pytest.raises(ScriptError, match="needs --coco"):
        read_dataset(None, "test", None, tmp_path)
