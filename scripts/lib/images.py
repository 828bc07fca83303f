"""Find image files and read them, still encoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from damoyolo_client.images import find_images as find_images
from damoyolo_client.images import require_file as require_file


def read_images(folder: Path) -> list[bytes]:
    """The JPEG files of a folder, in the order of their names.

    Raises:
        FileNotFoundError: there is none.
    """
    images = [path.read_bytes() for path in sorted(folder.glob("*.jpg")) if path.is_file()]
    if not images:
        raise FileNotFoundError(f"no *.jpg in {folder}; tests/data/smears/render.py draws some")
    return images


def cycled(images: Sequence[bytes], count: int, first: int = 0) -> list[bytes]:
    """`count` images, starting at `first` and going round."""
    return [images[(first + index) % len(images)] for index in range(count)]
