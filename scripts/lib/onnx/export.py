"""Write the network as an ONNX file of dynamic batch and size."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx.parser
import torch
from onnx import helper
from torch import Tensor, nn

from lib.onnx.options import OutputKind

from damoyolo.backends.onnx_metadata import INPUT_NAME, OUTPUT_NAMES, OnnxMetadata, RawOutputs, metadata_of
from damoyolo.boxes import STRIDES, boxes_from_distances, class_scores
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.model.pixel_stem import join_focus
from damoyolo.structures import RawPredictions

OPSET = 18  # the oldest that PyTorch's exporter writes without converting
MAX_SIDE = 32 * 1024  # pixels; the exporter needs a bound


class _BoxOutputs(nn.Module):
    """uint8 pixels in, scores and boxes of every anchor point out, for images of any size."""

    def __init__(self, model: DamoYolo) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        raw: RawPredictions = self.model(images.float())
        boxes = []
        for logits, stride in zip(raw.distance_logits, STRIDES, strict=True):
            height, width = logits.shape[-2:]
            # Not `anchor_points`, which caches by size: sizes have to stay dynamic here.
            y = torch.arange(height, dtype=torch.float32)[:, None].expand(height, width)
            x = torch.arange(width, dtype=torch.float32)[None, :].expand(height, width)
            points_xy = torch.stack((x, y), dim=-1).flatten(0, 1) * stride  # h * w, 2
            boxes.append(boxes_from_distances(logits.permute(0, 2, 3, 1).flatten(1, 2), points_xy, stride))
        return class_scores(raw.class_logits), torch.cat(boxes, dim=1)


def export_onnx(
    model: DamoYolo, path: Path, *, outputs: OutputKind = "raw", class_names: Sequence[str] | None = None
) -> None:
    """Write the network as an ONNX file; see `to_onnx`."""
    onnx.save(to_onnx(model, outputs=outputs, class_names=class_names), path)


def to_onnx(
    model: DamoYolo, *, outputs: OutputKind = "raw", class_names: Sequence[str] | None = None
) -> onnx.ModelProto:
    """The network as ONNX; equal weights give equal bytes under equal versions of the libraries.

    model: folded, in float32; left unchanged. class_names: for the metadata; None numbers the classes.
    """
    names = class_names or [str(index) for index in range(model.num_classes)]
    copied = join_focus(copy.deepcopy(model).cpu())
    network: nn.Module = (RawOutputs if outputs == "raw" else _BoxOutputs)(copied)
    written = _export(network.eval(), OUTPUT_NAMES if outputs == "raw" else ("scores", "boxes_xyxy"))
    _name_sizes(written)
    if outputs == "detections":
        _append_suppression(written)
    helper.set_model_props(written, metadata_of(model, names, outputs).to_metadata())
    onnx.checker.check_model(written)
    return written


def _export(network: nn.Module, output_names: Sequence[str]) -> onnx.ModelProto:
    # No two sides of the example are equal, or the exporter would tie them together.
    example = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=1024)
    rows = torch.export.Dim("rows", min=1, max=MAX_SIDE // 32)
    columns = torch.export.Dim("columns", min=1, max=MAX_SIDE // 32)
    with tempfile.TemporaryDirectory(prefix="onnx-") as folder, warnings.catch_warnings():
        # In some versions the exporter calls deprecated functions of PyTorch itself.
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
    """Drop names of source files, and inner shapes in the exporter's symbols."""
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
    """Name the dynamic sizes of inputs and outputs, in place of the exporter's symbols."""

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


# NMS in each class of each image, in standard operators; a row of nms_selected is image, class, anchor point.
_SUPPRESSION = """
suppression (float[1] iou_threshold, float[1] score_threshold, int64[1] max_boxes_a_class) => (
    float[detections, 4] boxes_xyxy,
    float[detections] scores,
    int64[detections] class_ids,
    int64[detections] batch_indices
) <int64[2] nms_box_columns = {0, 2}, int64[3] nms_score_columns = {0, 2, 1}> {
    nms_scores_by_class = Transpose <perm = [0, 2, 1]> (all_scores)
    nms_selected = NonMaxSuppression (
        all_boxes_xyxy, nms_scores_by_class, max_boxes_a_class, iou_threshold, score_threshold
    )
    nms_box_places = Gather <axis = 1> (nms_selected, nms_box_columns)
    boxes_xyxy = GatherND (all_boxes_xyxy, nms_box_places)
    nms_score_places = Gather <axis = 1> (nms_selected, nms_score_columns)
    scores = GatherND (all_scores, nms_score_places)
    nms_class_column = Constant <value_int = 1> ()
    class_ids = Gather <axis = 1> (nms_selected, nms_class_column)
    nms_batch_column = Constant <value_int = 0> ()
    batch_indices = Gather <axis = 1> (nms_selected, nms_batch_column)
}
"""


def _append_suppression(written: onnx.ModelProto) -> None:
    """Append NMS to the outputs "boxes"; thresholds become inputs."""
    graph = written.graph
    for node in graph.node:  # the final outputs take over these names
        for names in (node.input, node.output):
            names[:] = [f"all_{name}" if name in ("scores", "boxes_xyxy") else name for name in names]
    suppression = onnx.parser.parse_graph(_SUPPRESSION)
    for index, node in enumerate(suppression.node):
        node.name = f"nms_{index}"
    graph.input.extend(suppression.input)
    graph.initializer.extend(suppression.initializer)
    graph.node.extend(suppression.node)
    del graph.output[:]
    graph.output.extend(suppression.output)


def read_onnx_metadata(path: Path) -> OnnxMetadata:
    """The metadata of an ONNX file.

    Raises:
        ConfigError: the file is no ONNX file, or not one of this project.
    """
    try:
        written = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf's own class is not importable everywhere
        raise ConfigError(f"{path} is no ONNX file ({type(error).__name__})") from error
    return OnnxMetadata.from_metadata({entry.key: entry.value for entry in written.metadata_props}, path)
