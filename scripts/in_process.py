"""The detector of an archive in this process: the limit that a server can come close to."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import project_paths  # noqa: F401  -- makes damoyolo importable
from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE, Detector
from damoyolo.errors import ConfigError
from damoyolo.structures import DetectionOptions, RawPredictions
from measuring import Call, interleaved_medians_s

# What accuracy is stated for; `evaluate.py` has the same defaults.
EVALUATION_OPTIONS = DetectionOptions(score_threshold=0.05, iou_threshold=0.7, max_detections=500)


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
