"""Write the network as an ONNX file of dynamic batch and size, and check it against PyTorch.

python scripts/export_onnx.py --output damoyolo.onnx                         raw predictions, for the server
python scripts/export_onnx.py --output detections.onnx --outputs detections  boxes and NMS inside
python scripts/export_onnx.py --weights mine.pth --class-names mine.txt --output mine.onnx

Every file takes `images`, (B, 3, H, W) uint8 RGB with H and W multiples of 32. Outputs are float32 unless
stated otherwise:
  raw          class_logits_8, _16, _32 (B, K, h, w), distance_logits_8, _16, _32 (B, 4 * (R + 1), h, w)
  boxes        scores (B, A, K) in 0..1, boxes_xyxy (B, A, 4) in pixels of `images`
  detections   boxes_xyxy (N, 4), scores (N), class_ids (N) int64, batch_indices (N) int64, after NMS in each
               class of each image; further inputs are iou_threshold (1), score_threshold (1) and
               max_boxes_a_class (1) int64

Prints what was written and how far its outputs are from PyTorch's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lib.cli import command_parser, run_command
from lib.onnx.options import OUTPUT_KINDS
from lib.packaging.arguments import add_network_arguments, load_network
from lib.paths import SAMPLE_IMAGES


def main(argv: Sequence[str] | None = None) -> int:
    """Export and check; nothing is left where the check fails."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    from lib.onnx.check import check_onnx, sample_batches
    from lib.onnx.export import export_onnx

    model, class_names = load_network(arguments)
    batches = sample_batches(model, arguments.images)
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=output.parent) as folder:
        written = Path(folder) / output.name
        export_onnx(model, written, outputs=arguments.outputs, class_names=class_names)
        agreement = check_onnx(written, model, batches)
        written.replace(output)
    size_mb = output.stat().st_size / 1e6
    print(f"{output}: DAMO-YOLO-{model.variant.name}, {arguments.outputs}, {size_mb:.1f} MB")
    print(
        f"compared with PyTorch: scores within {agreement.score_difference:.1e}, "
        f"boxes within {agreement.box_difference_px:.1e} px"
    )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, renamed_options={"--form": "--outputs", "--pictures": "--images"})
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--outputs", choices=OUTPUT_KINDS, default="raw", help="see above (%(default)s)")
    add_network_arguments(parser)
    parser.add_argument(
        "--images",
        type=Path,
        default=SAMPLE_IMAGES,
        help="folder of JPEG files to check with (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
