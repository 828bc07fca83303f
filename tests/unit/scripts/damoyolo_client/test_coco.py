"""The category ids that the client chooses without an annotations file."""

import pytest

from damoyolo.coco_categories import COCO_CLASS_NAMES, coco_category_ids
from damoyolo_client.coco import default_category_ids

FULL = tuple(enumerate(COCO_CLASS_NAMES))


@pytest.mark.parametrize("seen", [FULL, FULL[::7], FULL[79:], ()], ids=["all", "some", "the last", "none"])
def test_classes_of_coco_have_the_category_ids_of_the_server(seen):
    of_server = dict(enumerate(coco_category_ids(COCO_CLASS_NAMES)))
    assert default_category_ids(dict(seen)) == {class_id: of_server[class_id] for class_id, _ in seen}


@pytest.mark.parametrize(
    "class_names",
    [
        ("Platelets", "RBC", "WBC"),
        ("person", "car"),
        (*COCO_CLASS_NAMES, "eel"),
        (*COCO_CLASS_NAMES[:13], "eel", *COCO_CLASS_NAMES[14:]),
    ],
    ids=["others", "another place", "one more", "one replaced"],
)
def test_other_classes_have_the_category_ids_of_the_server_and_no_two_one_id(class_names):
    ids = default_category_ids(dict(enumerate(class_names)))
    assert tuple(ids.values()) == coco_category_ids(class_names)
    assert len(set(ids.values())) == len(ids)


def test_the_client_and_the_handler_have_the_same_file_of_classes(project_dir):
    one, other = (
        project_dir / folder / "coco_categories.py"
        for folder in ("handler/damoyolo", "scripts/damoyolo_client")
    )
    assert one.read_bytes() == other.read_bytes()
    assert not other.is_symlink()
