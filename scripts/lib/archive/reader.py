"""The detector of an archive in this process: the limit that a server can come close to."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE, Detector
from damoyolo.errors import ConfigError
from damoyolo.structures import RawPredictions


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


def served_network(detector: Detector) -> Callable[[Tensor], RawPredictions]:
    """The network that the detector answers with: the rewritten and recorded one where it has that.

    Takes (B, 3, H, W) uint8 pixels on the device; raises ConfigError for more than a recording holds.
    """
    pipeline = detector.pipeline
    if pipeline is None:
        return detector.engine

    @torch.inference_mode()
    def predict(pixels: Tensor) -> RawPredictions:
        count = len(pixels)
        if count > pipeline.largest_batch:
            raise ConfigError(
                f"batch size {count} is compared, and the archive cuts up batches of more than "
                f"{pipeline.largest_batch} (setting graph_batch_sizes); give --batch-sizes up to that"
            )
        pipeline.pixels[:count].copy_(pixels)
        raw = pipeline.network_call(count)()
        # Copies: the next call overwrites what a recording wrote.
        return RawPredictions(*(tuple(level[:count].clone() for level in levels) for levels in raw))

    return predict
