"""Write answers of the Open Inference Protocol v2: the detections as tensors, in JSON or as binary data."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from damoyolo.response import clipped_boxes_xyxy
from damoyolo.structures import Detections

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
BINARY_CONTENT_TYPE = "application/octet-stream"
ELEMENT_LENGTH = struct.Struct("<I")  # before each element of a binary tensor of BYTES

_TensorOf = Callable[[Sequence[Detections], Sequence[str]], NDArray[Any]]


@dataclass(frozen=True)
class TensorRequest:
    """What an answer needs of its request.

    request_id: to be repeated; None if there was none.
    outputs: names of tensors in the order of the answer, and whether their data are binary.
    """

    request_id: str | None
    outputs: tuple[tuple[str, bool], ...]


class ModelIdentity(NamedTuple):
    """Name and version of the served model."""

    name: str
    version: str


def format_tensors(
    batch: Sequence[Detections], class_names: Sequence[str], request: TensorRequest, model: ModelIdentity
) -> tuple[bytes, int | None]:
    """The body of an answer for at least one image, and the length of its JSON part if binary data follow."""
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for name, is_binary in request.outputs:
        datatype, tensor_of = OUTPUT_TENSORS[name]
        tensor = tensor_of(batch, class_names)
        output = {"name": name, "datatype": datatype, "shape": list(tensor.shape)}
        if is_binary:
            binary.append(_binary_data(tensor))
            outputs.append({**output, "parameters": {"binary_data_size": len(binary[-1])}})
        else:
            outputs.append({**output, "data": tensor.ravel().tolist()})
    document: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if request.request_id is not None:
        document["id"] = request.request_id
    text = json.dumps({**document, "outputs": outputs}, separators=(",", ":")).encode("ascii")
    return b"".join((text, *binary)), len(text) if binary else None


def _counts(batch: Sequence[Detections], _: Sequence[str]) -> NDArray[Any]:
    return np.array([len(image) for image in batch], dtype="<i8")


def _boxes(batch: Sequence[Detections], _: Sequence[str]) -> NDArray[Any]:
    return np.concatenate([clipped_boxes_xyxy(image) for image in batch]).astype("<f4")


def _scores(batch: Sequence[Detections], _: Sequence[str]) -> NDArray[Any]:
    scores: NDArray[np.float32] = np.nan_to_num(np.concatenate([image.scores for image in batch]))
    return scores.astype("<f4")


def _class_ids(batch: Sequence[Detections], _: Sequence[str]) -> NDArray[Any]:
    return np.concatenate([image.class_ids for image in batch]).astype("<i8")


def _labels(batch: Sequence[Detections], class_names: Sequence[str]) -> NDArray[Any]:
    names = [class_names[class_id] for image in batch for class_id in image.class_ids.tolist()]
    return np.array(names, dtype=object)


# Datatype and values by name. For N images with M detections in all: counts (N,), boxes (M, 4) x1, y1, x2, y2
# in pixels and clipped to the image, (M,) for the others. The metadata in the front-end plugin
# (ModelMetadata.java) repeat names and datatypes.
OUTPUT_TENSORS: dict[str, tuple[str, _TensorOf]] = {
    "counts": ("INT64", _counts),
    "boxes": ("FP32", _boxes),
    "scores": ("FP32", _scores),
    "class_ids": ("INT64", _class_ids),
    "labels": ("BYTES", _labels),
}


def _binary_data(tensor: NDArray[Any]) -> bytes:
    if tensor.dtype != object:
        return tensor.tobytes()
    elements = [str(text).encode("utf-8") for text in tensor]
    return b"".join(part for element in elements for part in (ELEMENT_LENGTH.pack(len(element)), element))
