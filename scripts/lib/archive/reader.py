"""Unpack an archive, and open its detector in this process."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from damoyolo.detector import Detector


@contextlib.contextmanager
def unpacked(archive: Path) -> Iterator[Path]:
    """The folder of an unpacked archive: a temporary one for a .mar file, or the folder given."""
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
        return Detector.from_archive_dir(folder, device, **serving)


def archive_environment(folder: Path | str, **variables: str) -> dict[str, str]:
    """Environment of a process that runs the modules of an unpacked archive, as a worker does.

    variables: take precedence over those of this process.
    """
    search_path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": search_path, **variables}
