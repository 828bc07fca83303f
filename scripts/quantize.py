"""Writes the network in INT8 as a QDQ ONNX file, calibrated on your pictures; sensitive blocks stay float32.

python scripts/quantize.py --calibration pictures/ --output damoyolo_int8.onnx
python scripts/quantize.py --weights mine.pth --class-names mine.txt --calibration pictures/ \\
    --output mine.onnx --max-loss 0.005 --report mine.json --plot mine.png

Each block of the network is quantised alone and compared with float32 on pictures set aside; then the worst
are kept in float32, as few as the loss allowed demands. What is measured: scripts/sensitivity.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from tqdm import tqdm

from argument_types import fraction, name_list, positive_int
from build_archive import DEMO_WEIGHTS, default_class_names, read_class_names
from damoyolo.config import ServingConfig
from damoyolo.errors import DamoYoloError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.preprocess import ImagePreprocessor
from detect import NoPicturesError, find_pictures
from export_onnx import export_onnx, folded_network
from measuring import environment, format_table
from plots import BlockBar, plot_sensitivity
from qdq_network import (
    RANGE_METHODS,
    TARGETS,
    Block,
    QuantizationError,
    RangeMethod,
    Target,
    calibrate,
    find_blocks,
    quantize_blocks,
)
from sensitivity import Deviation, Judge, Sensitivity, fewest_kept, measure_blocks
from weights_source import WeightsError, fetch_weights

# Prediction convolutions and stem: all that is seen passes through them. What that costs in speed is in
# docs/quantization.md.
ALWAYS_FLOAT = ("head", "backbone.block_list.0", "backbone.csp_stage.0")
NO_BLOCK = "none"  # on the command line, in place of a name


@dataclass(frozen=True)
class QuantizationRequest:
    """What to make of a network.

    max_loss: AP that may be lost, as scripts/sensitivity.py estimates it.
    calibration_pictures, check_pictures: at most so many pictures are calibrated with, and compared on; no
        picture serves for both.
    float_blocks: names of blocks that stay float32 whatever the sweep says, or how such names begin.
    """

    max_loss: float = 0.005
    target: Target = "cpu"
    ranges: RangeMethod = "minmax"
    calibration_pictures: int = 32
    check_pictures: int = 16
    float_blocks: tuple[str, ...] = ALWAYS_FLOAT
    progress: bool | None = None


@dataclass(frozen=True)
class QuantizedNetwork:
    """A network in INT8, and how it came about.

    network: metadata and all. ranked: the worst block first. kept: float32 for the sake of the loss.
    all_int8: deviation where the sweep keeps nothing. deviation: of `network`.
    calibration_count, check_count: pictures that were calibrated with, and compared on.
    """

    network: onnx.ModelProto
    ranked: tuple[Sensitivity, ...]
    kept: tuple[str, ...]
    all_int8: Deviation
    deviation: Deviation
    calibration_count: int
    check_count: int


def quantize(
    network: onnx.ModelProto, pixels: NDArray[np.uint8], request: QuantizationRequest
) -> QuantizedNetwork:
    """Find the blocks that INT8 harms, and quantise the others.

    network: float32, as scripts/export_onnx.py writes it. pixels: (N, 3, H, W) uint8 RGB.

    Raises:
        QuantizationError: too few pictures, nothing found in them, or nothing that may be quantised.
    """
    calibration, check = split_pictures(len(pixels), request)
    blocks = find_blocks(network)
    _require_known(request.float_blocks, blocks)
    candidates = [block for block in blocks if not _stays_float(block, request.float_blocks)]
    if not candidates:
        raise QuantizationError(
            f"every block of the network is to stay float32 ({', '.join(request.float_blocks)}); "
            "change --keep-float"
        )
    judge = Judge(network, pixels[check])
    ranges = calibrate(network, pixels[calibration], request.ranges)
    disabled = None if request.progress is None else not request.progress
    with tqdm(candidates, desc="blocks", unit="block", disable=disabled) as shown:
        ranked = measure_blocks(network, ranges, shown, judge, request.target)

    attempts: dict[int, tuple[onnx.ModelProto, Deviation]] = {}

    def attempt(kept: int) -> tuple[onnx.ModelProto, Deviation]:
        if kept not in attempts:
            chosen = [each.block for each in ranked[kept:]]
            quantized = quantize_blocks(network, ranges, chosen, request.target)
            attempts[kept] = quantized, judge(quantized)
        return attempts[kept]

    kept = fewest_kept(len(ranked), lambda count: attempt(count)[1].loss, request.max_loss)
    if kept == len(ranked):
        raise QuantizationError(
            f"a loss of {request.max_loss:g} AP leaves nothing in INT8: the block that is harmed least loses "
            f"{attempt(len(ranked) - 1)[1].loss:.4f}; raise --max-loss, or give more pictures"
        )
    quantized, deviation = attempt(kept)
    facts = {entry.key: entry.value for entry in network.metadata_props}
    helper.set_model_props(quantized, {**facts, "precision": "int8"})
    onnx.checker.check_model(quantized)
    return QuantizedNetwork(
        quantized,
        tuple(ranked),
        tuple(each.block.name for each in ranked[:kept]),
        attempt(0)[1],
        deviation,
        len(calibration),
        len(check),
    )


def split_pictures(count: int, request: QuantizationRequest) -> tuple[list[int], list[int]]:
    """Indices of the pictures to calibrate with, and of those to compare on, both spread over all.

    Raises:
        QuantizationError: there are not two.
    """
    if count < 2:
        raise QuantizationError(
            f"{count} pictures given; accepted are 2 at least, some to calibrate with and some to compare on"
        )
    check = _spread(list(range(count)), min(request.check_pictures, max(1, count // 3)))
    rest = sorted(set(range(count)) - set(check))
    return _spread(rest, min(request.calibration_pictures, len(rest))), check


def _spread(indices: Sequence[int], count: int) -> list[int]:
    return [indices[index * len(indices) // count] for index in range(count)]


def _require_known(names: Sequence[str], blocks: Sequence[Block]) -> None:
    known = (*ALWAYS_FLOAT, NO_BLOCK)  # the default is for backbones of every kind
    for name in names:
        if name not in known and not any(_stays_float(block, [name]) for block in blocks):
            raise QuantizationError(
                f"no block is called {name}; accepted are {NO_BLOCK}, or names and beginnings up to a dot of "
                f"{', '.join(block.name for block in blocks)}: change --keep-float"
            )


def _stays_float(block: Block, names: Sequence[str]) -> bool:
    return any(block.name == name or block.name.startswith(f"{name}.") for name in names)


def picture_paths(folder: Path, at_most: int) -> list[Path]:
    """Pictures of a folder and of those below it; where there are more, spread over all.

    Raises:
        QuantizationError: there are none.
    """
    try:
        found = find_pictures([folder], recursive=True)
    except NoPicturesError as error:
        raise QuantizationError(f"{error}; --calibration takes a folder of pictures") from error
    return [found[index] for index in _spread(range(len(found)), min(at_most, len(found)))]


def read_pixels(paths: Sequence[Path], variant: str, input_size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Picture files as the server would feed them, (N, 3, H, W) uint8 RGB.

    Raises:
        QuantizationError: one cannot be read.
    """
    preprocessor = ImagePreprocessor(ServingConfig(variant=variant), input_size_hw, torch.device("cpu"))
    try:
        batch = preprocessor.prepare([path.read_bytes() for path in paths])
    finally:
        preprocessor.close()
    for slot, reason in batch.errors.items():
        raise QuantizationError(f"{paths[slot]}: {reason}; take it out of the folder of --calibration")
    return batch.pixels.contiguous().numpy()


def export_network(model: DamoYolo, class_names: Sequence[str]) -> onnx.ModelProto:
    """The float32 network as scripts/export_onnx.py writes it."""
    with tempfile.TemporaryDirectory(prefix="quantize-") as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(model, path, class_names=class_names)
        return onnx.load(path)


SENSITIVITY_COLUMNS = {
    "block": ("block", ""),
    "weights": ("weights", "d"),
    "drift": ("drift", ".4f"),
    "loss": ("AP loss", ".4f"),
    "stays": ("stays", ""),
}


def sensitivity_rows(result: QuantizedNetwork) -> list[dict[str, Any]]:
    """The table of the sweep, the worst block first."""
    return [
        {
            "block": each.block.name,
            "weights": each.block.weights,
            "drift": each.deviation.drift,
            "loss": each.deviation.loss,
            "stays": "float32" if each.block.name in result.kept else "INT8",
        }
        for each in result.ranked
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Quantise as the options say; nothing is left where that fails."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except (QuantizationError, WeightsError, DamoYoloError, OSError, ValueError, KeyError) as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    request = QuantizationRequest(
        arguments.max_loss,
        arguments.target,
        arguments.ranges,
        arguments.calibration_pictures,
        arguments.check_pictures,
        arguments.keep_float,
        arguments.progress,
    )
    paths = picture_paths(arguments.calibration, request.calibration_pictures + request.check_pictures)
    weights = fetch_weights(arguments.weights, arguments.sha256)
    given = arguments.class_names
    class_names = read_class_names(given) if given else default_class_names(weights)
    model = folded_network(weights, arguments.variant, len(class_names))
    height, width = arguments.input_size or model.variant.input_size_hw
    if height % 32 or width % 32:
        raise QuantizationError(f"--input-size is {height} {width}; accepted are multiples of 32, in pixels")
    pixels = read_pixels(paths, model.variant.name, (height, width))
    result = quantize(export_network(model, class_names), pixels, request)

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
    rows = sensitivity_rows(result)
    print(format_table(rows, SENSITIVITY_COLUMNS))
    print(
        f"always float32: {', '.join(request.float_blocks) or 'nothing'}\n"
        f"nothing else kept: drift {result.all_int8.drift:.4f}, AP loss {result.all_int8.loss:.4f}\n"
        f"{len(result.kept)} of {len(rows)} blocks kept: drift {result.deviation.drift:.4f}, "
        f"AP loss {result.deviation.loss:.4f} of {request.max_loss:g} allowed"
    )
    size_mb = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output}: DAMO-YOLO-{variant} in INT8 for {request.target}, {size_mb:.1f} MB")
    if arguments.report is not None:
        content = {
            "variant": variant,
            "weights": arguments.weights,
            "max_loss": request.max_loss,
            "target": request.target,
            "ranges": request.ranges,
            "calibration_pictures": result.calibration_count,
            "check_pictures": result.check_count,
            "always_float32": request.float_blocks,
            "kept_float32": result.kept,
            "all_int8": vars(result.all_int8),
            "result": vars(result.deviation),
            "blocks": rows,
            **environment(),
        }
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        arguments.report.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        print(f"report: {arguments.report}")
    if arguments.plot is not None:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        bars = [BlockBar(row["block"], row["drift"], row["stays"] == "float32") for row in rows]
        plot_sensitivity(arguments.plot, bars, f"DAMO-YOLO-{variant}: sensitivity of its blocks to INT8")
        print(f"plot: {arguments.plot}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="pictures like those to be served, folders below included; not those of the evaluation",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="ONNX", help="file to write")
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
        "--max-loss", type=fraction, default=0.005, metavar="AP", help="that may be lost (%(default)s)"
    )
    parser.add_argument(
        "--for",
        dest="target",
        choices=TARGETS,
        default="cpu",
        help="cpu: onnxruntime and OpenVINO; tensorrt: no zero points, inputs of convolutions alone "
        "(%(default)s)",
    )
    parser.add_argument(
        "--ranges",
        choices=RANGE_METHODS,
        default="minmax",
        help="of a value: extremes over all pictures, or the mean of each picture's (%(default)s)",
    )
    parser.add_argument("--calibration-pictures", type=positive_int, default=32, help="(%(default)s)")
    parser.add_argument("--check-pictures", type=positive_int, default=16, help="(%(default)s)")
    parser.add_argument(
        "--keep-float",
        type=name_list,
        default=ALWAYS_FLOAT,
        metavar="A,B",
        help="blocks that stay float32 whatever the sweep says, or how their names begin; "
        f"{NO_BLOCK} leaves all to the sweep ({','.join(ALWAYS_FLOAT)})",
    )
    parser.add_argument(
        "--input-size",
        type=positive_int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the network in pixels, multiples of 32 (the variant's own)",
    )
    parser.add_argument("--report", type=Path, metavar="JSON", help="write the table and all settings")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the table")
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bar on stderr (when that is a terminal)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
