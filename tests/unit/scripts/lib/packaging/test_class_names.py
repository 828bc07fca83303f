"""The built-in class names against the published list."""

from __future__ import annotations

import json
from pathlib import Path

from lib.packaging.class_names import COCO_CLASS_NAMES


def test_the_coco_names_are_the_published_ones_in_their_order(shared_dir: Path) -> None:
    published = json.loads((shared_dir / "model" / "variants.json").read_text())["class_names"]
    assert list(COCO_CLASS_NAMES) == published
    assert len(set(COCO_CLASS_NAMES)) == 80
