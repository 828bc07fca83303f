"""The list of official checkpoints against the published table."""

import json
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from lib.packaging.catalog import OFFICIAL_CHECKPOINTS


def test_every_published_file_that_fits_a_variant_is_listed_under_its_name(shared_dir):
    variants = json.loads((shared_dir / "model" / "variants.json").read_text())["variants"]
    published = {
        checkpoint["url"]
        for name, variant in variants.items()
        for checkpoint in variant["checkpoints"]
        if name != "N"  # its only file was made with former blocks
    }
    with_701_classes = OFFICIAL_CHECKPOINTS["damo_yolo_s_700+"]
    assert set(OFFICIAL_CHECKPOINTS.values()) == published | {with_701_classes}
    for name, url in OFFICIAL_CHECKPOINTS.items():
        assert name == PurePosixPath(unquote(urlsplit(url).path)).stem
        assert url.startswith("https://")
