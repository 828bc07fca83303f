"""Find image files and read them, still encoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lib.cli import ScriptError

# What a folder is searched for; a file named on the command line is sent whatever it is called.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


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


def require_file(path: Path) -> Path:
    """`path`, which has to be a regular file: a device or a pipe may never end.

    Raises:
        ScriptError: it is none.
    """
    if not path.exists():
        raise ScriptError(f"{path} does not exist")
    if not path.is_file():
        raise ScriptError(f"{path} is not a regular file")
    return path


def find_images(paths: Sequence[Path], recursive: bool) -> list[Path]:
    """The files among `paths`, and the images of its folders in alphabetical order.

    Raises:
        ScriptError: a path does not exist or is no regular file, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(require_file(path))
            continue
        entries = path.rglob("*") if recursive else path.iterdir()
        images = sorted(file for file in entries if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not images:
            hint = "" if recursive else "; --recursive searches its sub-folders too"
            raise ScriptError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}){hint}")
        found.extend(images)
    return found
