"""Build the archive that TorchServe serves: weights folded into plain convolutions, handler, settings.

python scripts/build_archive.py                                  the embedded demo weights
python scripts/build_archive.py --weights damoyolo_tinynasL25_S_477   an official checkpoint
python scripts/build_archive.py --weights mine.pth --class-names mine.txt --variant T
python scripts/build_archive.py --onnx quantised.onnx           with an ONNX file of the same weights inside

Prints the archive's path, variant, classes, size and digest. One that does not work replaces nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.cli import add_model, command_parser, fraction, positive_int, run_command
from lib.packaging.arguments import add_network_arguments
from lib.packaging.class_names import read_class_names
from lib.paths import MODEL_STORE

from damoyolo.config import BACKENDS, PRECISIONS


def main(argv: Sequence[str] | None = None) -> int:
    """Build the archive that the options describe."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    from lib.packaging.builder import ArchiveRequest, build_archive

    model_settings = {
        "batchSize": arguments.batch_size,
        "maxBatchDelay": arguments.max_batch_delay,
        "minWorkers": arguments.workers,
        "maxWorkers": arguments.workers,
        "responseTimeout": arguments.response_timeout,
    }
    serving = {
        "input_size_hw": arguments.input_size,
        "backend": arguments.backend,
        "precision": arguments.precision,
        "score_threshold": arguments.score_threshold,
        "iou_threshold": arguments.iou_threshold,
        "max_detections": arguments.max_detections,
    }
    report = build_archive(
        ArchiveRequest(
            weights=arguments.weights,
            sha256=arguments.sha256,
            variant=arguments.variant,
            class_names=read_class_names(arguments.class_names) if arguments.class_names else None,
            unused_class=arguments.unused_class,
            model_name=arguments.model,
            version=arguments.version,
            onnx=arguments.onnx,
            output_dir=arguments.output_dir,
            model_settings={key: value for key, value in model_settings.items() if value is not None},
            serving={key: value for key, value in serving.items() if value is not None},
        )
    )
    size_mb = report.path.stat().st_size / 1e6
    print(f"{report.path}: DAMO-YOLO-{report.variant}, {report.num_classes} classes, {size_mb:.1f} MB")
    print(f"content SHA-256 {report.digest}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, {"--model-name": "--model"})
    add_network_arguments(parser)
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
    parser.add_argument(
        "--response-timeout",
        type=positive_int,
        metavar="S",
        help="longest time of a batch (default: 30 s)",
    )
    add_model(parser)
    parser.add_argument("--version", default="1.0")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", default=MODEL_STORE, help="(%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
