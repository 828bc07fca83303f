"""A network equivalent to the demo network, with one block that is sensitive to INT8."""

import numpy as np
import onnx
from onnx import numpy_helper

FRAGILE = "backbone.block_list.2.block_list.1"
# Kept float32, so that a sweep takes seconds.
ALL_BUT_ONE_STAGE = ("head", "neck", *(f"backbone.block_list.{index}" for index in (0, 1, 3, 4, 5)))


def with_fragile_block(network, name=FRAGILE, factor=2.0**12):
    """The same function, with one channel inside a residual block much larger than its neighbours.

    ReLU commutes with a positive factor, so the next convolution undoes it, exactly for a power of two.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(network)
    tensors = {tensor.name: tensor for tensor in changed.graph.initializer}
    # The channel with the largest weights, so that the loss is not that of its neighbours.
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
