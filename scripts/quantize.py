"""Write the network in INT8 as a QDQ ONNX file, calibrated on your images; sensitive blocks stay float32.

python scripts/quantize.py --calibration images/ --output damoyolo_int8.onnx
python scripts/quantize.py --weights mine.pth --class-names mine.txt --calibration images/ \\
    --output mine.onnx --max-loss 0.005 --json mine.json --plot mine.png

Each block of the network is quantised alone and compared with float32 on images set aside. Then the most
sensitive blocks are kept in float32, as few as the allowed loss demands. The measures are described in
scripts/lib/onnx/sensitivity.py.

Prints the effect of each block, and what the file loses.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import ScriptError, command_parser, fraction, name_list, positive_int, run_command
from lib.json_file import write_json
from lib.onnx.options import NO_BLOCK, RANGE_METHODS, TARGETS, QuantizationRequest
from lib.packaging.arguments import add_network_arguments, load_network

if TYPE_CHECKING:
    from lib.onnx.quantization import QuantizedNetwork

SENSITIVITY_COLUMNS = {
    "block": ("block", ""),
    "weights": ("weights", "d"),
    "drift": ("drift", ".4f"),
    "loss": ("AP loss", ".4f"),
    "stays": ("stays", ""),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Quantise as the options say; nothing is left where that fails."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    import onnx

    from lib.onnx.export import to_onnx
    from lib.onnx.quantization import image_paths, quantize, read_pixels

    fields = dataclasses.fields(QuantizationRequest)
    request = QuantizationRequest(**{each.name: getattr(arguments, each.name) for each in fields})
    paths = image_paths(arguments.calibration, request.calibration_images + request.check_images)
    model, class_names = load_network(arguments)
    height, width = arguments.input_size or model.variant.input_size_hw
    if height % 32 or width % 32:
        raise ScriptError(f"--input-size is {height} {width}; accepted are multiples of 32, in pixels")
    pixels = read_pixels(paths, model.variant.name, (height, width))
    result = quantize(to_onnx(model, class_names=class_names), pixels, request)

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_name(f".{arguments.output.name}.part")
    try:
        onnx.save(result.network, partial)
        partial.replace(arguments.output)
    finally:
        partial.unlink(missing_ok=True)
    _report(arguments, request, model.variant.name, result)


def _report(
    arguments: argparse.Namespace, request: QuantizationRequest, variant: str, result: QuantizedNetwork
) -> None:
    from lib.measure.timing import format_table

    rows: list[dict[str, Any]] = [
        {
            "block": each.block.name,
            "weights": each.block.weights,
            "drift": each.deviation.drift,
            "loss": each.deviation.loss,
            "stays": "float32" if each.block.name in result.kept else "INT8",
        }
        for each in result.ranked
    ]
    print(format_table(rows, SENSITIVITY_COLUMNS))
    print(
        f"always float32: {', '.join(result.always_float) or 'nothing'}\n"
        f"no other block kept: drift {result.all_int8.drift:.4f}, AP loss {result.all_int8.loss:.4f}\n"
        f"{len(result.kept)} of {len(rows)} blocks kept: drift {result.deviation.drift:.4f}, "
        f"AP loss {result.deviation.loss:.4f} of {request.max_loss:g} allowed"
    )
    size_mb = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output}: DAMO-YOLO-{variant} in INT8 for {request.target}, {size_mb:.1f} MB")
    if arguments.json is not None:
        _write_report(arguments, request, variant, result, rows)
    if arguments.plot is not None:
        from lib.measure.plots import BlockBar, plot_sensitivity

        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        bars = [BlockBar(row["block"], row["drift"], row["stays"] == "float32") for row in rows]
        plot_sensitivity(arguments.plot, bars, f"DAMO-YOLO-{variant}: sensitivity of its blocks to INT8")
        print(f"plot: {arguments.plot}")


def _write_report(
    arguments: argparse.Namespace,
    request: QuantizationRequest,
    variant: str,
    result: QuantizedNetwork,
    rows: list[dict[str, Any]],
) -> None:
    from lib.measure.environment import environment

    content = {
        "variant": variant,
        "weights": arguments.weights,
        **{name: getattr(request, name) for name in ("max_loss", "target", "ranges")},
        "calibration_images": result.calibration_count,
        "check_images": result.check_count,
        "always_float32": result.always_float,
        "kept_float32": result.kept,
        "all_int8": vars(result.all_int8),
        "result": vars(result.deviation),
        "blocks": rows,
        **environment(),
    }
    write_json(arguments.json, content)
    print(f"report: {arguments.json}")


def _parser() -> argparse.ArgumentParser:
    renamed = {
        "--calibration-pictures": "--calibration-images",
        "--check-pictures": "--check-images",
        "--report": "--json",
    }
    parser = command_parser(__doc__, renamed)
    parser.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="images like those to be served, in it or its sub-folders; not those of the evaluation",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    add_network_arguments(parser)
    _add_quantization_arguments(parser)
    parser.add_argument(
        "--input-size",
        type=positive_int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the network in pixels, multiples of 32 (the variant's own)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table and all settings")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table")
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bar on stderr (when that is a terminal)",
    )
    return parser


def _add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-loss", type=fraction, default=0.005, metavar="AP", help="that may be lost (%(default)s)"
    )
    parser.add_argument(
        "--for",
        dest="target",
        choices=TARGETS,
        default="openvino",
        help="backend that the file is for; openvino and onnxruntime also run each other's, but slower "
        "(%(default)s)",
    )
    parser.add_argument(
        "--ranges",
        choices=RANGE_METHODS,
        default="minmax",
        help="of activations: extremes over all images, or the mean of each image's (%(default)s)",
    )
    parser.add_argument("--calibration-images", type=positive_int, default=32, help="(%(default)s)")
    parser.add_argument("--check-images", type=positive_int, default=16, help="(%(default)s)")
    parser.add_argument(
        "--keep-float",
        dest="float_blocks",
        type=name_list,
        metavar="A,B",
        help="blocks that always stay float32, or prefixes of their names (the stem for tensorrt, else "
        f"{NO_BLOCK}: the sweep decides about all)",
    )


if __name__ == "__main__":
    sys.exit(main())
