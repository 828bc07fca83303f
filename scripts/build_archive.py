"""Builds the archive that TorchServe serves: weights folded into plain convolutions, handler, settings.

python scripts/build_archive.py                                  the embedded demo weights
python scripts/build_archive.py --weights damoyolo_tinynasL25_S_477   an official checkpoint
python scripts/build_archive.py --weights mine.pth --class-names mine.txt --variant T
python scripts/build_archive.py --onnx quantised.onnx           with that form of the same weights inside
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.cli import fraction, positive_int
from lib.packaging.builder import ArchiveError, ArchiveRequest, build_archive
from lib.packaging.class_names import read_class_names
from lib.packaging.weights import WeightsError
from lib.paths import DEMO_WEIGHTS, MODEL_STORE

from damoyolo.config import BACKENDS, PRECISIONS
from damoyolo.errors import DamoYoloError
from damoyolo.model.variants import VARIANTS


def main(argv: Sequence[str] | None = None) -> int:
    """Build the archive that the options describe."""
    arguments = _parser().parse_args(argv)
    model_settings = {
        "batchSize": arguments.batch_size,
        "maxBatchDelay": arguments.max_batch_delay,
        "minWorkers": arguments.workers,
        "maxWorkers": arguments.workers,
    }
    serving = {
        "input_size_hw": arguments.input_size,
        "backend": arguments.backend,
        "precision": arguments.precision,
        "score_threshold": arguments.score_threshold,
        "iou_threshold": arguments.iou_threshold,
        "max_detections": arguments.max_detections,
    }
    try:
        report = build_archive(
            ArchiveRequest(
                weights=arguments.weights,
                sha256=arguments.sha256,
                variant=arguments.variant,
                class_names=read_class_names(arguments.class_names) if arguments.class_names else None,
                model_name=arguments.model_name,
                version=arguments.version,
                onnx=arguments.onnx,
                output_dir=arguments.output_dir,
                model_settings={key: value for key, value in model_settings.items() if value is not None},
                serving={key: value for key, value in serving.items() if value is not None},
            )
        )
    except (WeightsError, DamoYoloError, ArchiveError, OSError, ValueError, KeyError) as error:
        print(f"build_archive: {error}", file=sys.stderr)
        return 1
    size_mb = report.path.stat().st_size / 1e6
    print(f"{report.path}: DAMO-YOLO-{report.variant}, {report.num_classes} classes, {size_mb:.1f} MB")
    print(f"content SHA-256 {report.digest}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights",
        default=str(DEMO_WEIGHTS),
        help="file, https address or official name (default: the demo weights)",
    )
    parser.add_argument("--sha256", help="what the weights have to have, in hexadecimal")
    parser.add_argument("--variant", choices=sorted(VARIANTS), help="default: the one that the weights fit")
    parser.add_argument(
        "--class-names",
        type=Path,
        help="text (a name a line) or JSON file (default: the demo's for its weights, else COCO's 80)",
    )
    parser.add_argument(
        "--input-size",
        type=positive_int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="network input in pixels, multiples of 32 (default: the variant's)",
    )
    parser.add_argument("--backend", choices=BACKENDS, help="backend that runs the network (default: auto)")
    parser.add_argument("--onnx", type=Path, help="ONNX file of these weights, say a quantised one, to pack")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: auto")
    parser.add_argument("--score-threshold", type=fraction)
    parser.add_argument("--iou-threshold", type=fraction)
    parser.add_argument("--max-detections", type=positive_int)
    parser.add_argument("--batch-size", type=positive_int, help="most requests that share a batch")
    parser.add_argument(
        "--max-batch-delay", type=positive_int, metavar="MS", help="wait for a batch to fill, in ms"
    )
    parser.add_argument("--workers", type=positive_int)
    parser.add_argument("--model-name", default="damoyolo")
    parser.add_argument("--version", default="1.0")
    parser.add_argument("--output-dir", type=Path, default=MODEL_STORE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
