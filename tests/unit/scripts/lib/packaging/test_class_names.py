"""Class names: the published list, and those of files."""

import json

import pytest

from lib.cli import ScriptError
from lib.packaging.class_names import COCO_CLASS_NAMES, check_class_names, read_class_names


def test_the_coco_names_are_the_published_ones_in_their_order(shared_dir):
    published = json.loads((shared_dir / "model" / "variants.json").read_text())["class_names"]
    assert list(COCO_CLASS_NAMES) == published
    assert len(set(COCO_CLASS_NAMES)) == 80


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "one\n\n two \n"),
        ("a.json", '["one", "two"]'),
        ("a.json", '{"1": "two", "0": "one"}'),
    ],
)
def test_class_names_are_read_from_text_and_json(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_class_names(tmp_path / name) == ("one", "two")


@pytest.mark.parametrize(
    "content",
    [None, b'["one"', b'{"1": "one"}', b'"one"', b"3", b'["\xff"]', b'[["a"]]', b"[null]", b"[" * 500_000],
)
def test_a_missing_or_malformed_file_is_refused_with_what_is_accepted(tmp_path, content):
    path = tmp_path / "names.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ScriptError, match=r"names\.json gives no class names .*; accepted is a text file"):
        read_class_names(path)


@pytest.mark.parametrize("name", ["a\x00", "a\x1b[2J", "a\u202eb", "a" * 201])
def test_a_name_that_cannot_be_shown_is_refused(tmp_path, name):
    (tmp_path / "names.txt").write_text(f"one\n{name}\n")
    with pytest.raises(ScriptError, match="printable characters"):
        read_class_names(tmp_path / "names.txt")


def test_a_name_that_is_there_twice_is_refused():
    with pytest.raises(ScriptError, match="two classes are called a, b;"):
        check_class_names(["b", "a", "c", "a", "b"])


def test_a_file_without_names_is_refused(tmp_path):
    (tmp_path / "names.txt").write_text("\n")
    with pytest.raises(ScriptError, match="no class names"):
        read_class_names(tmp_path / "names.txt")
