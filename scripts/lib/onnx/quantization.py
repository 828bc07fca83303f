"""Find the blocks that INT8 harms, and quantise the others."""

from __future__ import annotations

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

from lib.cli import ScriptError
from lib.images import find_images
from lib.onnx.export import export_onnx
from lib.onnx.qdq import (
    Block,
    QuantizationError,
    RangeMethod,
    Target,
    calibrate,
    find_blocks,
    quantize_blocks,
)
from lib.onnx.sensitivity import Deviation, QuantizationEvaluator, Sensitivity, fewest_kept, measure_blocks

from damoyolo.config import ServingConfig
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.preprocess import ImagePreprocessor

# Prediction convolutions and stem: all that is seen passes through them. What that costs in speed is in
# docs/quantization.md.
NO_BLOCK = "none"  # on the command line, in place of a name
ALWAYS_FLOAT = ("head", "backbone.block_list.0", "backbone.csp_stage.0")


@dataclass(frozen=True)
class QuantizationRequest:
    """What to make of a network.

    max_loss: AP that may be lost, as lib/onnx/sensitivity.py estimates it.
    calibration_images, check_images: at most so many images are calibrated with, and compared on; no
        image serves for both.
    float_blocks: names of blocks that stay float32 whatever the sweep says, or how such names begin.
    """

    max_loss: float = 0.005
    target: Target = "cpu"
    ranges: RangeMethod = "minmax"
    calibration_images: int = 32
    check_images: int = 16
    float_blocks: tuple[str, ...] = ALWAYS_FLOAT
    progress: bool | None = None


@dataclass(frozen=True)
class QuantizedNetwork:
    """A network in INT8, and how it came about.

    network: metadata and all. ranked: the worst block first. kept: float32 for the sake of the loss.
    all_int8: deviation where the sweep keeps nothing. deviation: of `network`.
    calibration_count, check_count: images that were calibrated with, and compared on.
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
        QuantizationError: too few images, nothing found in them, or nothing that may be quantised.
    """
    calibration, check = split_images(len(pixels), request)
    blocks = find_blocks(network)
    _require_known(request.float_blocks, blocks)
    candidates = [block for block in blocks if not _stays_float(block, request.float_blocks)]
    if not candidates:
        raise QuantizationError(
            f"every block of the network is to stay float32 ({', '.join(request.float_blocks)}); "
            "change --keep-float"
        )
    evaluate_deviation = QuantizationEvaluator(network, pixels[check])
    ranges = calibrate(network, pixels[calibration], request.ranges)
    disabled = None if request.progress is None else not request.progress
    with tqdm(candidates, desc="blocks", unit="block", disable=disabled) as shown:
        ranked = measure_blocks(network, ranges, shown, evaluate_deviation, request.target)

    attempts: dict[int, tuple[onnx.ModelProto, Deviation]] = {}

    def attempt(kept: int) -> tuple[onnx.ModelProto, Deviation]:
        if kept not in attempts:
            chosen = [each.block for each in ranked[kept:]]
            quantized = quantize_blocks(network, ranges, chosen, request.target)
            attempts[kept] = quantized, evaluate_deviation(quantized)
        return attempts[kept]

    kept = fewest_kept(len(ranked), lambda count: attempt(count)[1].loss, request.max_loss)
    if kept == len(ranked):
        raise QuantizationError(
            f"a loss of {request.max_loss:g} AP leaves nothing in INT8: the block that is harmed least loses "
            f"{attempt(len(ranked) - 1)[1].loss:.4f}; raise --max-loss, or give more images"
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


def split_images(count: int, request: QuantizationRequest) -> tuple[list[int], list[int]]:
    """Indices of the images to calibrate with, and of those to compare on, both spread over all.

    Raises:
        QuantizationError: there are not two.
    """
    if count < 2:
        raise QuantizationError(
            f"{count} images given; accepted are 2 at least, some to calibrate with and some to compare on"
        )
    check = _spread(list(range(count)), min(request.check_images, max(1, count // 3)))
    rest = sorted(set(range(count)) - set(check))
    return _spread(rest, min(request.calibration_images, len(rest))), check


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


def image_paths(folder: Path, at_most: int) -> list[Path]:
    """Images of a folder and of those below it; where there are more, spread over all.

    Raises:
        QuantizationError: there are none.
    """
    try:
        found = find_images([folder], recursive=True)
    except ScriptError as error:
        raise QuantizationError(f"{error}; --calibration takes a folder of images") from error
    return [found[index] for index in _spread(range(len(found)), min(at_most, len(found)))]


def read_pixels(paths: Sequence[Path], variant: str, input_size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Image files as the server would feed them, (N, 3, H, W) uint8 RGB.

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
