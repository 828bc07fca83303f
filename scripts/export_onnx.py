"""Writes the network as an ONNX file of dynamic batch and size, and checks it against PyTorch.

python scripts/export_onnx.py --output damoyolo.onnx                    raw predictions, what the server runs
python scripts/export_onnx.py --output detections.onnx --form detections    boxes and NMS inside
python scripts/export_onnx.py --weights mine.pth --class-names mine.txt --output mine.onnx

Every form takes `images`, (B, 3, H, W) uint8 RGB with H and W multiples of 32, and gives float32 unless said:
  raw          class_logits_8, _16, _32 (B, K, h, w), distance_logits_8, _16, _32 (B, 4 * (R + 1), h, w)
  boxes        scores (B, A, K) in 0..1, boxes_xyxy (B, A, 4) in pixels of `images`
  detections   boxes_xyxy (N, 4), scores (N), class_ids (N) int64, batch_indices (N) int64, each class of each
               image suppressed by itself; takes iou_threshold (1), score_threshold (1) and
               max_boxes_a_class (1) int64 too
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lib.onnx.check import ExportError, check_onnx, sample_batches
from lib.onnx.export import OUTPUT_KINDS, export_onnx
from lib.packaging.class_names import default_class_names, read_class_names
from lib.packaging.weights import WeightsError, fetch_weights, folded_network
from lib.paths import DEMO_WEIGHTS, SAMPLE_IMAGES

from damoyolo.errors import DamoYoloError


def main(argv: Sequence[str] | None = None) -> int:
    """Export and check; nothing is left where the check fails."""
    arguments = _parser().parse_args(argv)
    try:
        weights = fetch_weights(arguments.weights, arguments.sha256)
        given = arguments.class_names
        class_names = read_class_names(given) if given else default_class_names(weights)
        model = folded_network(weights, arguments.variant, len(class_names))
        batches = sample_batches(model, arguments.images)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".exporting-", dir=arguments.output.parent) as folder:
            written = Path(folder) / arguments.output.name
            export_onnx(model, written, form=arguments.form, class_names=class_names)
            agreement = check_onnx(written, model, batches)
            written.replace(arguments.output)
    except (ExportError, WeightsError, DamoYoloError, OSError, ValueError, KeyError) as error:
        print(f"export_onnx: {error}", file=sys.stderr)
        return 1
    size_mb = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output}: DAMO-YOLO-{model.variant.name}, {arguments.form}, {size_mb:.1f} MB")
    print(
        f"beside PyTorch: scores within {agreement.score_difference:.1e}, "
        f"boxes within {agreement.box_difference_px:.1e} px"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--form", choices=OUTPUT_KINDS, default="raw", help="what comes out (%(default)s)")
    parser.add_argument(
        "--weights",
        default=str(DEMO_WEIGHTS),
        help="file, https address or official name (default: the demo weights)",
    )
    parser.add_argument("--sha256", help="what the weights have to have, in hexadecimal")
    parser.add_argument("--variant", help="default: the one that the weights fit")
    parser.add_argument(
        "--class-names",
        type=Path,
        help="text (a name a line) or JSON file (default: the demo's for its weights, else COCO's 80)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        default=SAMPLE_IMAGES,
        help="folder of JPEG files to check with (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
