"""Quantise chosen blocks of an ONNX network to INT8 in QDQ format, with calibrated ranges.

QDQ is plain ONNX: a pair of QuantizeLinear and DequantizeLinear nodes marks each tensor that a backend may
compute in 8-bit integers. Weights are int8, symmetric, with a scale for each output channel.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    create_calibrator,
)

from lib.cli import ScriptError
from lib.onnx.options import RangeMethod, Target

Ranges = Any  # of the activations, as onnxruntime's calibration returns them

# What onnxruntime computes in integers: everything between two convolutions, so that no value has to become
# float32 and back in between.
INTEGER_OPERATORS = ("Add", "Concat", "Conv", "MaxPool", "Mul", "Relu", "Resize", "Sigmoid")

# The part of a weight's name that names its block; `model/` has the names.
_BLOCK_NAME = re.compile(
    r"(backbone\.block_list\.0(?=\.conv)"  # the stem
    r"|backbone\.block_list\.\d+\.block_list\.\d+"
    r"|backbone\.csp_stage\.0|backbone\.csp_stage\.\d+\.(?:convstem\.\d+|\w+)"
    r"|neck\.\w+(?:\.convs\.\d+)?"
    r"|head\.\w+)"
)
# These only gather the inputs of the convolution that they lead to; other nodes belong to what they follow.
_LEADING_OPERATORS = ("Cast", "Slice", "Concat", "Resize")


@dataclass(frozen=True)
class Block:
    """Nodes that are quantised together or not at all.

    name: as in the checkpoint's keys. nodes: names in the ONNX file. weights: number of values they hold.
    """

    name: str
    nodes: tuple[str, ...]
    weights: int


def find_blocks(network: onnx.ModelProto) -> tuple[Block, ...]:
    """The blocks of a network that scripts/export_onnx.py wrote, in execution order.

    Every node from the first convolution on is in exactly one of them.

    Raises:
        ScriptError: there are none, or weights have other names than scripts/export_onnx.py gives.
    """
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in network.graph.initializer}
    block_of_value: dict[str, str] = {}
    block_of_node: dict[str, str] = {}
    order: dict[str, int] = {}
    weights: dict[str, int] = {}
    for node in network.graph.node:
        block = None
        if node.op_type == "Conv":
            found = _BLOCK_NAME.search(node.input[1])
            if found is None:
                raise ScriptError(
                    f"the weights {node.input[1]} are in no known block; accepted are files that "
                    "scripts/export_onnx.py wrote"
                )
            block = found[1]
            order.setdefault(block, len(order))
            weights[block] = weights.get(block, 0) + sizes[node.input[1]]
        elif node.op_type not in _LEADING_OPERATORS:
            # The shortcut of a sum comes from an earlier block.
            before = [block_of_value[name] for name in node.input if name in block_of_value]
            block = max(before, key=order.__getitem__, default=None)
        if block is not None:
            block_of_node[node.name] = block
            block_of_value.update(dict.fromkeys(node.output, block))
    block_of_use: dict[str, str] = {}
    # Nodes before the first convolution only rearrange pixels.
    for node in reversed(network.graph.node[_first_convolution(network) :]):
        users = (block_of_use[name] for name in node.output if name in block_of_use)
        block = block_of_node.get(node.name) or next(users, None)
        if block is not None:
            block_of_node[node.name] = block
            block_of_use.update(dict.fromkeys(node.input, block))
    return tuple(
        Block(
            name,
            tuple(node.name for node in network.graph.node if block_of_node.get(node.name) == name),
            weights[name],
        )
        for name in order
    )


def _first_convolution(network: onnx.ModelProto) -> int:
    for index, node in enumerate(network.graph.node):
        if node.op_type == "Conv":
            return index
    raise ScriptError("the network has no convolutions; accepted are files that scripts/export_onnx.py wrote")


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Feeds images, (N, 3, H, W), one by one."""

    def __init__(self, input_name: str, pixels: NDArray[np.uint8]) -> None:
        self._feeds = iter({input_name: image[None]} for image in pixels)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return next(self._feeds, None)


def calibrate(network: onnx.ModelProto, pixels: NDArray[np.uint8], method: RangeMethod = "minmax") -> Ranges:
    """The range of every activation over these images, for `quantize_blocks`.

    pixels: (N, 3, H, W) uint8 RGB. method: "minmax" takes the extremes over all images; "mean" the mean of
        each image's extremes, which clips values that occur in few images.

    Raises:
        ScriptError: there are no images.
    """
    if not len(pixels):
        raise ScriptError("there are no images to calibrate with; accepted is at least one")
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder, _quiet():
        path = Path(folder) / "network.onnx"
        onnx.save(onnx.shape_inference.infer_shapes(network), path)
        calibrator = create_calibrator(
            path,
            INTEGER_OPERATORS,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"moving_average": method == "mean"},
        )
        # One image at a time, for memory and for means over images.
        calibrator.collect_data(_Images(network.graph.input[0].name, pixels))
        return calibrator.compute_data()


def quantize_blocks(
    network: onnx.ModelProto, ranges: Ranges, chosen: Collection[Block], target: Target = "openvino"
) -> onnx.ModelProto:
    """A copy of the network in which the chosen blocks are INT8.

    ranges: what `calibrate` returned for this network.
    target: "openvino" quantises the inputs of convolutions to uint8 with zero points. OpenVINO computes
        activation, sum and next quantisation as part of a convolution; a pair in between would make them
        calls of their own. "onnxruntime" quantises the operators between convolutions too, without which
        it computes nothing in integers. "tensorrt" quantises inputs of convolutions to int8 without zero
        points, which is all that TensorRT supports.
    """
    quantized = onnx.shape_inference.infer_shapes(network)
    if chosen:
        with _quiet():
            quantizer = QDQQuantizer(
                quantized,
                per_channel=True,
                reduce_range=False,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QInt8 if target == "tensorrt" else QuantType.QUInt8,
                tensors_range=ranges,
                nodes_to_quantize=[name for block in chosen for name in block.nodes],
                nodes_to_exclude=[],
                op_types_to_quantize=list(INTEGER_OPERATORS if target == "onnxruntime" else ("Conv",)),
                extra_options=_quantizer_options(network, target),
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()  # new nodes were appended
        quantized = quantizer.model.model
    return quantized


def _quantizer_options(network: onnx.ModelProto, target: Target) -> dict[str, Any]:
    """`extra_options` of onnxruntime's quantiser."""
    options: dict[str, Any] = {"ActivationSymmetric": target == "tensorrt", "WeightSymmetric": True}
    if target != "onnxruntime":
        options |= {"QuantizeBias": False, "OpTypesToExcludeOutputQuantization": ["Conv"]}
    if target == "tensorrt":
        options["AddQDQPairToWeight"] = True
    else:
        entry, weight = network.graph.node[_first_convolution(network)].input[:2]
        # Pixels are whole numbers from 0 to 255: a scale of 1 keeps them exact.
        exact = {"scale": np.array(1.0, np.float32), "zero_point": np.array(0, np.uint8)}
        # Processors without VNNI add two products in 16 bits. Pixels reach 255, so that weights of 8 bits
        # would saturate that sum; 64 is the largest weight that cannot (docs/quantization.md).
        seven_bits = {"axis": 0, "reduce_range": True}
        options["TensorQuantOverrides"] = {entry: [exact], weight: [seven_bits]}
    return options


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's general advice out of the log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
