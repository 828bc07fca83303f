"""Encoded images from folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# What a folder is searched for; a file named on the command line is sent whatever it is called.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def read_pictures(folder: Path) -> list[bytes]:
    """The JPEG files of a folder, in the order of their names.

    Raises:
        FileNotFoundError: there is none.
    """
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    if not pictures:
        raise FileNotFoundError(f"no *.jpg in {folder}; tests/data/smears/render.py draws some")
    return pictures


def cycled(pictures: Sequence[bytes], count: int, first: int = 0) -> list[bytes]:
    """So many pictures, from the `first` on and over again."""
    return [pictures[(first + index) % len(pictures)] for index in range(count)]


class NoPicturesError(Exception):
    """A path on the command line leads to no picture."""


def find_pictures(paths: Sequence[Path], recursive: bool) -> list[Path]:
    """The files among `paths`, and the pictures of its folders in alphabetical order.

    Raises:
        NoPicturesError: a path does not exist, or a folder holds no picture.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise NoPicturesError(f"{path} does not exist")
            found.append(path)
            continue
        entries = path.rglob("*") if recursive else path.iterdir()
        pictures = sorted(
            file for file in entries if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()
        )
        if not pictures:
            hint = "" if recursive else "; --recursive searches its sub-folders too"
            raise NoPicturesError(f"{path} holds no pictures ({', '.join(PICTURE_SUFFIXES)}){hint}")
        found.extend(pictures)
    return found
