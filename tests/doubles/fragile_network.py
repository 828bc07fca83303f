"""A network that computes the same as the demo network, and of which INT8 harms one block."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

FRAGILE = "backbone.block_list.2.block_list.1"


def with_fragile_block(
    network: onnx.ModelProto, name: str = FRAGILE, factor: float = 2.0**12
) -> onnx.ModelProto:
    """The same function, but one channel inside a residual block is far larger than its neighbours.

    ReLU lets a positive factor pass, so that the next convolution can undo it exactly (a power of two).
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(network)
    tensors = {tensor.name: tensor for tensor in changed.graph.initializer}
    # The channel that has most to say, so that its neighbours' loss is not its own.
    inner = f"model.{name}.conv1.conv1"
    weight = numpy_helper.to_array(tensors[f"model.{name}.conv2.weight"]).copy()
    channel = int(np.abs(weight).sum(axis=(0, 2, 3)).argmax())
    weight[:, channel] /= factor
    values = {f"model.{name}.conv2.weight": weight}
    for suffix in ("weight", "bias"):
        value = numpy_helper.to_array(tensors[f"{inner}.{suffix}"]).copy()
        value[channel] *= factor
        values[f"{inner}.{suffix}"] = value
    for key, value in values.items():
        tensors[key].CopyFrom(numpy_helper.from_array(value, key))
    return changed
