"""The ids by which files of COCO's format name the classes."""

import pytest

from damoyolo.coco_categories import COCO_CLASS_NAMES, coco_category_ids


def test_classes_of_coco_have_the_ids_of_its_annotations():
    ids = dict(zip(COCO_CLASS_NAMES, coco_category_ids(COCO_CLASS_NAMES), strict=True))
    # From instances_val2017.json; each is the first after a gap, or the last before one.
    known = {"person": 1, "fire hydrant": 11, "stop sign": 13, "bear": 23, "giraffe": 25, "backpack": 27}
    known |= {"umbrella": 28, "handbag": 31, "bottle": 44, "wine glass": 46, "potted plant": 64, "bed": 65}
    known |= {"dining table": 67, "toilet": 70, "tv": 72, "refrigerator": 82, "book": 84, "toothbrush": 90}
    assert {name: ids[name] for name in known} == known
    assert sorted(set(ids.values())) == list(ids.values())
    assert len(ids) == 80


def test_the_order_of_the_classes_does_not_matter():
    backwards = COCO_CLASS_NAMES[::-1]
    assert coco_category_ids(backwards) == coco_category_ids(COCO_CLASS_NAMES)[::-1]


@pytest.mark.parametrize(
    "class_names", [("Platelets", "RBC", "WBC"), ("person", "car"), (*COCO_CLASS_NAMES, "eel"), ()]
)
def test_other_classes_are_numbered_from_one(class_names):
    assert coco_category_ids(class_names) == tuple(range(1, len(class_names) + 1))
