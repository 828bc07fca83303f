"""Write the network as an ONNX file of dynamic batch and size."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from damoyolo.backends.onnx_metadata import INPUT_NAME, OUTPUT_NAMES, OnnxMetadata, RawOutputs, metadata_of
from damoyolo.boxes import STRIDES, boxes_from_distances, class_scores
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.structures import RawPredictions

OutputKind = Literal["raw", "boxes", "detections"]
OUTPUT_KINDS: tuple[OutputKind, ...] = ("raw", "boxes", "detections")
OPSET = 18  # the oldest that PyTorch's exporter writes without converting
MAX_SIDE = 32 * 1024  # pixels; the exporter wants a bound


class _BoxOutputs(nn.Module):
    """Grey levels as bytes in, scores and boxes of every anchor point out, for images of any size."""

    def __init__(self, model: DamoYolo) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        raw: RawPredictions = self.model(images.float())
        boxes = []
        for logits, stride in zip(raw.distance_logits, STRIDES, strict=True):
            height, width = logits.shape[-2:]
            # Not `anchor_points`: it remembers sizes, which have to stay open here.
            y = torch.arange(height, dtype=torch.float32)[:, None].expand(height, width)
            x = torch.arange(width, dtype=torch.float32)[None, :].expand(height, width)
            points_xy = torch.stack((x, y), dim=-1).flatten(0, 1) * stride  # h * w, 2
            boxes.append(boxes_from_distances(logits.permute(0, 2, 3, 1).flatten(1, 2), points_xy, stride))
        return class_scores(raw.class_logits), torch.cat(boxes, dim=1)


def export_onnx(
    model: DamoYolo, path: Path, *, form: OutputKind = "raw", class_names: Sequence[str] | None = None
) -> None:
    """Write the network as ONNX; equal weights give equal bytes under equal versions of the libraries.

    model: folded, in float32; left as it is. class_names: for the metadata; None numbers the classes.
    """
    names = class_names or [str(index) for index in range(model.num_classes)]
    network: nn.Module = (RawOutputs if form == "raw" else _BoxOutputs)(copy.deepcopy(model).cpu())
    outputs = OUTPUT_NAMES if form == "raw" else ("scores", "boxes_xyxy")
    written = _export(network.eval(), outputs)
    _name_sizes(written)
    if form == "detections":
        _append_suppression(written)
    helper.set_model_props(written, metadata_of(model, names, form).to_metadata())
    onnx.checker.check_model(written)
    onnx.save(written, path)


def _export(network: nn.Module, output_names: Sequence[str]) -> onnx.ModelProto:
    # No side of the example equals another, or the exporter would take them for one.
    example = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=1024)
    rows = torch.export.Dim("rows", min=1, max=MAX_SIDE // 32)
    columns = torch.export.Dim("columns", min=1, max=MAX_SIDE // 32)
    with tempfile.TemporaryDirectory(prefix="onnx-") as folder, warnings.catch_warnings():
        # What the exporter calls of PyTorch's own is deprecated in some versions; nothing of it is ours.
        warnings.simplefilter("ignore")
        target = Path(folder) / "network.onnx"
        torch.onnx.export(
            network,
            (example,),
            target,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=list(output_names),
            dynamic_shapes=({0: batch, 2: 32 * rows, 3: 32 * columns},),
            external_data=False,
            verbose=False,
        )
        written = onnx.load(target)
    _strip_metadata(written)
    return written


def _strip_metadata(written: onnx.ModelProto) -> None:
    """Drop what names source files of the machine, and the inner shapes, whose symbols mean nothing."""
    del written.graph.value_info[:]
    del written.graph.metadata_props[:]
    for item in (
        *written.graph.node,
        *written.graph.input,
        *written.graph.output,
        *written.graph.initializer,
    ):
        del item.metadata_props[:]
        item.doc_string = ""


def _name_sizes(written: onnx.ModelProto) -> None:
    """Plain names for the open sizes, in place of the exporter's symbols."""

    def name(value: onnx.ValueInfoProto, *names: str | None) -> None:
        for dimension, text in zip(value.type.tensor_type.shape.dim, names, strict=True):
            if text is not None:
                dimension.dim_param = text

    (images,) = written.graph.input
    name(images, "batch", None, "height", "width")
    for output in written.graph.output:
        stride = output.name.rpartition("_")[2]
        if stride.isdigit():
            name(output, "batch", None, f"height/{stride}", f"width/{stride}")
        else:
            name(output, "batch", "anchor_points", None)


def _append_suppression(written: onnx.ModelProto) -> None:
    """Class-wise NMS in standard operators behind the form "boxes"; thresholds become inputs."""
    graph = written.graph
    del graph.output[:]

    def tensor(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    graph.input.extend(
        [
            tensor("iou_threshold", TensorProto.FLOAT, 1),
            tensor("score_threshold", TensorProto.FLOAT, 1),
            tensor("max_boxes_a_class", TensorProto.INT64, 1),
        ]
    )
    graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        for name, values in {
            "nms.batch_column": [0],
            "nms.class_column": [1],
            "nms.box_columns": [0, 2],
            "nms.score_columns": [0, 2, 1],
            "nms.second_axis": [1],
        }.items()
    )
    for each in graph.node:  # these names are those of the outputs now
        for names in (each.input, each.output):
            for index, name in enumerate(names):
                if name in ("scores", "boxes_xyxy"):
                    names[index] = f"all_{name}"

    def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=f"nms.{output}", **attributes)

    def column(name: str, output: str) -> list[onnx.NodeProto]:
        return [
            node("Gather", ["nms.selected", f"nms.{name}"], f"nms.{output}", axis=1),
            node("Squeeze", [f"nms.{output}", "nms.second_axis"], output),
        ]

    graph.node.extend(
        [
            node("Transpose", ["all_scores"], "nms.scores_by_class", perm=[0, 2, 1]),  # B,A,K -> B,K,A
            node(
                "NonMaxSuppression",
                [
                    "all_boxes_xyxy",
                    "nms.scores_by_class",
                    "max_boxes_a_class",
                    "iou_threshold",
                    "score_threshold",
                ],
                "nms.selected",  # N,3: image, class, anchor point
            ),
            node("Gather", ["nms.selected", "nms.box_columns"], "nms.box_places", axis=1),
            node("GatherND", ["all_boxes_xyxy", "nms.box_places"], "boxes_xyxy"),
            node("Gather", ["nms.selected", "nms.score_columns"], "nms.score_places", axis=1),
            node("GatherND", ["all_scores", "nms.score_places"], "scores"),
            *column("class_column", "class_ids"),
            *column("batch_column", "batch_indices"),
        ]
    )
    graph.output.extend(
        [
            tensor("boxes_xyxy", TensorProto.FLOAT, "detections", 4),
            tensor("scores", TensorProto.FLOAT, "detections"),
            tensor("class_ids", TensorProto.INT64, "detections"),
            tensor("batch_indices", TensorProto.INT64, "detections"),
        ]
    )


def read_onnx_metadata(path: Path) -> OnnxMetadata:
    """What a file says of itself.

    Raises:
        ConfigError: it is no ONNX file, or none of this project.
    """
    try:
        written = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the reader's own class is not importable everywhere
        raise ConfigError(f"{path} is no ONNX file ({type(error).__name__})") from error
    return OnnxMetadata.from_metadata({entry.key: entry.value for entry in written.metadata_props}, path)
