"""Quantise a network to INT8, except for its sensitive blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from tqdm import tqdm

from lib.cli import ScriptError
from lib.images import find_images
from lib.onnx.options import NO_BLOCK, QuantizationRequest
from lib.onnx.qdq import Block, calibrate, find_blocks, quantize_blocks
from lib.onnx.sensitivity import Deviation, QuantizationEvaluator, Sensitivity, fewest_kept, measure_blocks

from damoyolo.config import ServingConfig
from damoyolo.preprocess import ImagePreprocessor


@dataclass(frozen=True)
class QuantizedNetwork:
    """A network in INT8, and how it was made.

    network: with metadata. always_float: blocks, or prefixes of their names, that were not measured.
    ranked: the most sensitive block first. kept: blocks kept in float32 to limit the
    loss. all_int8: deviation if none were kept. deviation: of `network`.
    calibration_count, check_count: number of images calibrated with, and compared on.
    """

    network: onnx.ModelProto
    always_float: tuple[str, ...]
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
        ScriptError: too few images, no detections in them, or nothing that may be quantised.
    """
    calibration, check = split_images(len(pixels), request)
    blocks = find_blocks(network)
    float_blocks = always_float(blocks, request)
    candidates = _candidates(blocks, float_blocks)
    evaluator = QuantizationEvaluator(network, pixels[check])
    ranges = calibrate(network, pixels[calibration], request.ranges)
    disabled = None if request.progress is None else not request.progress
    with tqdm(candidates, desc="blocks", unit="block", disable=disabled) as shown:
        ranked = measure_blocks(network, ranges, shown, evaluator, request.target)

    @functools.cache
    def attempt(kept: int) -> tuple[onnx.ModelProto, Deviation]:
        """The network with the `kept` most sensitive blocks in float32, and its deviation."""
        chosen = [each.block for each in ranked[kept:]]
        quantized = quantize_blocks(network, ranges, chosen, request.target)
        return quantized, evaluator.deviation_of(quantized)

    kept = fewest_kept(len(ranked), lambda count: attempt(count)[1].loss, request.max_loss)
    if kept == len(ranked):
        raise ScriptError(
            f"a loss of {request.max_loss:g} AP leaves nothing in INT8: the least sensitive block loses "
            f"{attempt(len(ranked) - 1)[1].loss:.4f}; raise --max-loss, or give more images"
        )
    quantized, deviation = attempt(kept)
    metadata = {entry.key: entry.value for entry in network.metadata_props}
    helper.set_model_props(quantized, {**metadata, "precision": "int8"})
    onnx.checker.check_model(quantized)
    return QuantizedNetwork(
        quantized,
        float_blocks,
        tuple(ranked),
        tuple(each.block.name for each in ranked[:kept]),
        attempt(0)[1],
        deviation,
        len(calibration),
        len(check),
    )


def always_float(blocks: Sequence[Block], request: QuantizationRequest) -> tuple[str, ...]:
    """The blocks, or prefixes of their names, that a request exempts from INT8."""
    if request.float_blocks is None:
        return (blocks[0].name,) if request.target == "tensorrt" else ()  # the first block is the stem
    return tuple(name for name in request.float_blocks if name != NO_BLOCK)


def _candidates(blocks: Sequence[Block], float_blocks: Sequence[str]) -> list[Block]:
    """The blocks that may be quantised."""

    def stays_float(block: Block, names: Sequence[str]) -> bool:
        return any(block.name == name or block.name.startswith(f"{name}.") for name in names)

    for name in float_blocks:
        if not any(stays_float(block, [name]) for block in blocks):
            raise ScriptError(
                f"no block is called {name}; accepted are {NO_BLOCK}, or names and prefixes up to a dot of "
                f"{', '.join(block.name for block in blocks)}: change --keep-float"
            )
    candidates = [block for block in blocks if not stays_float(block, float_blocks)]
    if not candidates:
        raise ScriptError(
            f"every block of the network is to stay float32 ({', '.join(float_blocks)}); change --keep-float"
        )
    return candidates


def split_images(count: int, request: QuantizationRequest) -> tuple[list[int], list[int]]:
    """Indices of the images to calibrate with, and of those to compare on, each evenly spaced.

    Raises:
        ScriptError: there are fewer than two.
    """
    if count < 2:
        raise ScriptError(
            f"{count} images given; accepted are at least 2, some to calibrate with and some to compare on"
        )
    check = _spread(range(count), min(request.check_images, max(1, count // 3)))
    rest = sorted(set(range(count)) - set(check))
    return _spread(rest, min(request.calibration_images, len(rest))), check


def _spread(indices: Sequence[int], count: int) -> list[int]:
    return [indices[index * len(indices) // count] for index in range(count)]


def image_paths(folder: Path, at_most: int) -> list[Path]:
    """Images of a folder and its sub-folders; if there are more, `at_most` evenly spaced ones.

    Raises:
        ScriptError: there are none.
    """
    if not folder.is_dir():
        raise ScriptError(f"{folder} is no folder; --calibration takes a folder of images")
    found = find_images([folder], recursive=True)
    return [found[index] for index in _spread(range(len(found)), min(at_most, len(found)))]


def read_pixels(paths: Sequence[Path], variant: str, input_size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Image files as the server would feed them, (N, 3, H, W) uint8 RGB.

    Raises:
        ScriptError: one cannot be read.
    """
    preprocessor = ImagePreprocessor(ServingConfig(variant=variant), input_size_hw, torch.device("cpu"))
    try:
        batch = preprocessor.prepare([path.read_bytes() for path in paths])
    finally:
        preprocessor.close()
    for slot, reason in batch.errors.items():
        raise ScriptError(f"{paths[slot]}: {reason}; remove it from the folder of --calibration")
    return batch.pixels.contiguous().numpy()
