"""The detector of an archive in this process: the limit that a server can come close to."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE, Detector


@contextlib.contextmanager
def unpacked(archive: Path) -> Iterator[Path]:
    """The folder of an unpacked archive: a temporary one for a .mar file; a folder is one already."""
    if archive.is_dir():
        yield archive
        return
    with tempfile.TemporaryDirectory(prefix="archive-") as folder:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
        yield Path(folder)


def load_detector(archive: Path, device: torch.device, **serving: Any) -> Detector:
    """The detector of an archive. serving: settings in place of the archive's own (ServingConfig)."""
    with unpacked(archive) as folder:
        settings = yaml.safe_load((folder / SETTINGS_FILE).read_text())["handler"]
        return Detector.from_settings({**settings, **serving}, folder / WEIGHTS_FILE, device)


def archive_environment(folder: Path | str, **variables: str) -> dict[str, str]:
    """Environment variables of a process that runs the modules of an unpacked archive, as a worker would.

    variables: further ones, in place of those of this process.
    """
    search_path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": search_path, **variables}
