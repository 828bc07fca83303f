"""The detector of an archive in this process: the limit that a server can come close to."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import project_paths  # noqa: F401  -- makes damoyolo importable
from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE, Detector
from measuring import Call, interleaved_medians_s


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


def read_pictures(folder: Path) -> list[bytes]:
    """The JPEG files of a folder, in the order of their names.

    Raises:
        FileNotFoundError: there is none.
    """
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    if not pictures:
        raise FileNotFoundError(f"no *.jpg in {folder}; scripts/render_smears.py draws some")
    return pictures


def cycled(pictures: Sequence[bytes], count: int, first: int = 0) -> list[bytes]:
    """So many pictures, from the `first` on and over again."""
    return [pictures[(first + index) % len(pictures)] for index in range(count)]


def batch_seconds(
    detector: Detector, pictures: Sequence[bytes], batch_size: int, rounds: int = 5, slice_s: float = 0.3
) -> tuple[float, float]:
    """Median seconds of a batch: of the network (pixels to raw predictions), and of the whole detector."""
    medians_s = interleaved_medians_s(
        batch_calls(detector, pictures, batch_size), detector.device, rounds, slice_s
    )
    return medians_s["network"], medians_s["detector"]


def batch_calls(detector: Detector, pictures: Sequence[bytes], batch_size: int) -> dict[str, Call]:
    """The "network" alone and the whole "detector", each for one batch."""
    batch = cycled(pictures, batch_size)
    options = [detector.config.default_options()] * batch_size
    if detector.pipeline is not None:
        network: Call = detector.pipeline.network_call(batch_size)
    else:
        network = functools.partial(detector.engine, detector.preprocessor.prepare(batch).pixels)
    return {"network": network, "detector": functools.partial(detector.detect, batch, options)}
