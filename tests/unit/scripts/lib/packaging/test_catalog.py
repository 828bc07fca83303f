"""The list of official checkpoints against the published table."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from lib.packaging.catalog import OFFICIAL_CHECKPOINTS

from damoyolo.model.variants import VARIANTS


def test_every_published_file_that_fits_a_variant_is_listed(shared_dir: Path) -> None:
    facts = json.loads((shared_dir / "model" / "variants.json").read_text())["variants"]
    published = {
        (name, entry["url"], entry["mAP"])
        for name, variant in facts.items()
        for entry in variant["checkpoints"]
        if name != "N"  # its only file was made with blocks of before
    }
    with_coco_classes = {
        (entry.variant, entry.url, entry.coco_ap)
        for entry in OFFICIAL_CHECKPOINTS.values()
        if entry.num_classes == 80
    }
    assert with_coco_classes == published


def test_a_checkpoint_is_called_like_its_file() -> None:
    for name, entry in OFFICIAL_CHECKPOINTS.items():
        assert name == PurePosixPath(unquote(urlsplit(entry.url).path)).stem
        assert entry.url.startswith("https://")
        assert entry.variant in VARIANTS
