"""An ONNX file of the network from float32 to float16 throughout, for backends that take its types literally.

Pixels stay uint8 and the raw predictions float32; each is cast where it enters and leaves.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from damoyolo.backends.onnx_metadata import INPUT_NAME

# Regions and scales of a Resize are float32 whatever it resizes (ONNX operator schema).
FLOAT_INPUTS = {"Resize": (1, 2)}


class HalfError(Exception):
    """The file cannot be brought into float16."""


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float16 copy of a float32 network, which says so in its metadata; checked by type inference.

    Raises:
        HalfError: a weight is beyond float16, or the network casts where this does not expect it.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    stay_float = {
        node.input[index]
        for node in graph.node
        for index in FLOAT_INPUTS.get(node.op_type, ())
        if index < len(node.input)
    }
    for constant in graph.initializer:
        if constant.data_type == TensorProto.FLOAT and constant.name not in stay_float:
            constant.CopyFrom(_tensor_to_half(constant))
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] not in stay_float:
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                    attribute.t.CopyFrom(_tensor_to_half(attribute.t))
        if node.op_type == "Cast" and (to := _attribute(node, "to")).i == TensorProto.FLOAT:
            if node.input[0] != INPUT_NAME:
                raise HalfError(f"{node.name} casts to float32; only the pixels are expected to be cast")
            to.i = TensorProto.FLOAT16
    _cast_outputs(graph)
    del graph.value_info[:]
    for entry in half.metadata_props:
        if entry.key == "precision":
            entry.value = "fp16"
    try:
        onnx.checker.check_model(half, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise HalfError(f"in float16 the types of the network do not fit together: {error}") from error
    return half


def _tensor_to_half(tensor: onnx.TensorProto) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise HalfError(f"{tensor.name} holds values beyond float16; use float32")
    return numpy_helper.from_array(values.astype(np.float16), tensor.name)


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    found: onnx.AttributeProto = next(each for each in node.attribute if each.name == name)
    return found


def _cast_outputs(graph: onnx.GraphProto) -> None:
    """Give each output under its name in float32; inside, what made it is called otherwise."""
    inner = {output.name: f"{output.name}_half" for output in graph.output}
    for node in graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
    graph.node.extend(
        helper.make_node("Cast", [half], [name], name=f"cast_{name}", to=TensorProto.FLOAT)
        for name, half in inner.items()
    )
