"""Pictures per second of the detector in this process, beside those of its bare network.

    python scripts/benchmark_detector.py --archive model_store/damoyolo.mar --batch-sizes 1 8 32

The network column starts from pixels on the device and ends with raw predictions there; the detector column
starts from JPEG files and ends with detections on the host. A row is a precision; all calls of a batch size
take turns in one run.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import project_paths
from argument_types import positive_int
from damoyolo.accelerate import PRECISIONS_OF_DEVICE
from damoyolo.detector import Detector
from measuring import Call, environment, interleaved_medians_s


def measure_precisions(
    archive: Path,
    precisions: Sequence[str],
    batch_sizes: Sequence[int],
    pictures: Sequence[bytes],
    device: torch.device,
) -> list[dict[str, Any]]:
    """One row a precision and batch size, with the seconds of a batch and pictures per second of both."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
        detectors = {
            precision: Detector.from_archive_dir(Path(folder), device, precision) for precision in precisions
        }
    rows = []
    for batch_size in batch_sizes:
        batch = [pictures[index % len(pictures)] for index in range(batch_size)]
        calls: dict[str, Call] = {}
        for precision, detector in detectors.items():
            pixels = detector.preprocessor.prepare(batch).pixels
            options = [detector.config.default_options()] * batch_size
            calls[f"network {precision}"] = functools.partial(detector.engine, pixels)
            calls[f"detector {precision}"] = functools.partial(detector.detect, batch, options)
        medians_s = interleaved_medians_s(calls, device)
        for precision in precisions:
            network_s, detector_s = medians_s[f"network {precision}"], medians_s[f"detector {precision}"]
            rows.append(
                {
                    "precision": precision,
                    "batch_size": batch_size,
                    "network_ms": network_s * 1e3,
                    "detector_ms": detector_s * 1e3,
                    "network_pictures_per_s": batch_size / network_s,
                    "detector_pictures_per_s": batch_size / detector_s,
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    root = project_paths.PROJECT_DIR
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, default=root / "model_store" / "damoyolo.mar")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precisions", nargs="+", help="default: all of the device")
    parser.add_argument("--batch-sizes", nargs="+", type=positive_int, default=[1, 8, 32])
    parser.add_argument(
        "--pictures", type=Path, default=root / "tests" / "data" / "smears", help="folder of JPEG files"
    )
    parser.add_argument("--json", type=Path, help="file that gets one JSON row a measurement")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    pictures = [path.read_bytes() for path in sorted(arguments.pictures.glob("*.jpg"))]
    if not pictures:
        print(f"benchmark_detector: no *.jpg in {arguments.pictures}", file=sys.stderr)
        return 1
    precisions = arguments.precisions or PRECISIONS_OF_DEVICE[device.type]
    rows = measure_precisions(arguments.archive, precisions, arguments.batch_sizes, pictures, device)
    facts = environment()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("precision batch  network ms  pictures/s detector ms  pictures/s")
    for row in rows:
        print(
            f"{row['precision']:>9} {row['batch_size']:>5} {row['network_ms']:>11.2f} "
            f"{row['network_pictures_per_s']:>11.1f} {row['detector_ms']:>11.2f} "
            f"{row['detector_pictures_per_s']:>11.1f}"
        )
    if arguments.json:
        with arguments.json.open("a") as file:
            for row in rows:
                file.write(json.dumps({**row, **facts}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
