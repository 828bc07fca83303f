"""Unpack an archive, and open its detector in this process."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lib.archive.members import opened_archive, parse_settings
from lib.cli import ScriptError

from damoyolo.config import SETTINGS_FILE
from damoyolo.detector import Detector


@contextlib.contextmanager
def unpacked(archive: Path) -> Iterator[Path]:
    """The folder of an unpacked archive: a temporary one for a .mar file, or the folder given.

    Raises:
        ScriptError: it cannot be read, or is damaged.
    """
    if archive.is_dir():
        yield archive
        return
    with tempfile.TemporaryDirectory(prefix="archive-") as folder:
        with opened_archive(archive) as opened:
            opened.extractall(folder)
        yield Path(folder)


def load_detector(archive: Path, device: torch.device, **serving: Any) -> Detector:
    """The detector of an archive. serving: settings in place of the archive's own (ServingConfig).

    Raises:
        ScriptError, DamoYoloError: the archive cannot be read, or its parts do not fit together.
    """
    with unpacked(archive) as folder:
        settings_file = folder / SETTINGS_FILE
        if not settings_file.is_file():
            raise ScriptError(f"{archive} lacks {SETTINGS_FILE}; scripts/build_archive.py builds an archive")
        if "handler" not in parse_settings(settings_file.read_bytes(), archive):
            raise ScriptError(f"{SETTINGS_FILE} of {archive} has no section handler:")
        return Detector.from_archive_dir(folder, device, **serving)


def archive_environment(folder: Path | str, **variables: str) -> dict[str, str]:
    """Environment of a process that runs the modules of an unpacked archive, as a worker does.

    variables: take precedence over those of this process.
    """
    search_path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": search_path, **variables}
