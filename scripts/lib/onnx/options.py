"""Choices and defaults of the ONNX commands. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OutputKind = Literal["raw", "boxes", "detections"]
OUTPUT_KINDS: tuple[OutputKind, ...] = ("raw", "boxes", "detections")
Target = Literal["openvino", "onnxruntime", "tensorrt"]
TARGETS: tuple[Target, ...] = ("openvino", "onnxruntime", "tensorrt")
RangeMethod = Literal["minmax", "mean"]
RANGE_METHODS: tuple[RangeMethod, ...] = ("minmax", "mean")

NO_BLOCK = "none"  # on the command line, in place of a block's name


@dataclass(frozen=True)
class QuantizationRequest:
    """How to quantise a network.

    max_loss: AP that may be lost, as lib/onnx/sensitivity.py estimates it.
    calibration_images, check_images: at most this many images are calibrated with, and compared on; no image
        is used for both.
    float_blocks: names of blocks that always stay float32, or prefixes of such names up to a dot; NO_BLOCK is
        no block. None is the target's default: the stem for TensorRT, whose int8 has no zero points, so that
        pixels would lose their lowest bit; otherwise none.
    progress: show a progress bar; None shows it on a terminal.
    """

    max_loss: float = 0.005
    target: Target = "openvino"
    ranges: RangeMethod = "minmax"
    calibration_images: int = 32
    check_images: int = 16
    float_blocks: tuple[str, ...] | None = None
    progress: bool | None = None
