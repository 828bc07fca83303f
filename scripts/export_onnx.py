"""Writes the network as an ONNX file of dynamic batch and size, and checks it against PyTorch.

python scripts/export_onnx.py --output damoyolo.onnx                    raw predictions, what the server runs
python scripts/export_onnx.py --output detections.onnx --form detections    boxes and NMS inside
python scripts/export_onnx.py --weights mine.pth --class-names mine.txt --output mine.onnx

Every form takes `images`, (B, 3, H, W) uint8 RGB with H and W multiples of 32, and gives float32 unless said:
  raw          class_logits_8, _16, _32 (B, K, h, w), distance_logits_8, _16, _32 (B, 4 * (R + 1), h, w)
  boxes        scores (B, A, K) in 0..1, boxes_xyxy (B, A, 4) in pixels of `images`
  detections   boxes_xyxy (N, 4), scores (N), class_ids (N) int64, batch_indices (N) int64, each class of each
               picture suppressed by itself; takes iou_threshold (1), score_threshold (1) and
               max_boxes_a_class (1) int64 too
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

import project_paths  # noqa: F401  (makes damoyolo importable)
from agreement import Agreement, compare_decoded
from build_archive import DEMO_WEIGHTS, SAMPLE_PICTURES, default_class_names, read_class_names
from damoyolo.backends.onnx_form import INPUT_NAME, OUTPUT_NAMES, OnnxFacts, RawForm, as_predictions, facts_of
from damoyolo.boxes import STRIDES, boxes_from_distances, class_scores, decode_predictions
from damoyolo.checkpoint import load_checkpoint, load_packaged, save_packaged
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError, DamoYoloError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.postprocess import postprocess
from damoyolo.preprocess import ImagePreprocessor
from damoyolo.structures import DetectionOptions, RawPredictions
from weights_source import WeightsError, fetch_weights

Form = Literal["raw", "boxes", "detections"]
FORMS: tuple[Form, ...] = ("raw", "boxes", "detections")
OPSET = 18  # the oldest that PyTorch's exporter writes without converting
SCORE_TOLERANCE, BOX_TOLERANCE_PX = 2e-5, 1e-2  # those of the golden outputs
CHECK_OPTIONS = DetectionOptions(score_threshold=0.25, iou_threshold=0.45, max_detections=100_000)
MAX_SIDE = 32 * 1024  # pixels; the exporter wants a bound


class ExportError(Exception):
    """The file that was written does not give what the network gives."""


class _BoxesForm(nn.Module):
    """Grey levels as bytes in, scores and boxes of every anchor point out, for pictures of any size."""

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
    model: DamoYolo, path: Path, *, form: Form = "raw", class_names: Sequence[str] | None = None
) -> None:
    """Write the network as ONNX; equal weights give equal bytes under equal versions of the libraries.

    model: folded, in float32; left as it is. class_names: for the metadata; None numbers the classes.
    """
    names = class_names or [str(index) for index in range(model.num_classes)]
    network: nn.Module = (RawForm if form == "raw" else _BoxesForm)(copy.deepcopy(model).cpu())
    outputs = OUTPUT_NAMES if form == "raw" else ("scores", "boxes_xyxy")
    written = _export(network.eval(), outputs)
    _name_sizes(written)
    if form == "detections":
        _append_suppression(written)
    helper.set_model_props(written, facts_of(model, names, form).to_metadata())
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
    _forget_origin(written)
    return written


def _forget_origin(written: onnx.ModelProto) -> None:
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
                "nms.selected",  # N,3: picture, class, anchor point
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


def read_facts(path: Path) -> OnnxFacts:
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
    return OnnxFacts.from_metadata({entry.key: entry.value for entry in written.metadata_props}, path)


def check_onnx(
    path: Path,
    model: DamoYolo,
    pictures: Sequence[Tensor],
    *,
    score_tolerance: float = SCORE_TOLERANCE,
    box_tolerance_px: float = BOX_TOLERANCE_PX,
) -> Agreement:
    """Run a file with onnxruntime on the CPU and compare it with the network in PyTorch.

    pictures: batches, (B, 3, H, W) uint8 RGB each, of any sizes that are multiples of 32.

    Raises:
        ExportError: a score, or a likely box, differs by more than the tolerance; says how far.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compare = {
        OUTPUT_NAMES: _compare_raw,
        ("scores", "boxes_xyxy"): _compare_boxes,
        ("boxes_xyxy", "scores", "class_ids", "batch_indices"): _compare_detections,
    }.get(tuple(output.name for output in session.get_outputs()))
    if compare is None:
        raise ExportError(f"{path} has the outputs of no form that this script writes")
    agreements = []
    for pixels in pictures:
        with torch.inference_mode():
            raw = model(pixels.float())
        agreements.append(compare(session, pixels, raw))
    agreement = Agreement(
        max(each.score_difference for each in agreements), max(each.box_difference_px for each in agreements)
    )
    # So written that a NaN is refused too.
    if not (
        agreement.score_difference <= score_tolerance and agreement.box_difference_px <= box_tolerance_px
    ):
        raise ExportError(
            f"{path} differs from PyTorch by {agreement.score_difference:.2g} in a score and "
            f"{agreement.box_difference_px:.2g} px in a box; accepted are {score_tolerance:g} and "
            f"{box_tolerance_px:g} px"
        )
    return agreement


def _run(session: Any, inputs: Mapping[str, NDArray[Any]]) -> list[Tensor]:
    return [torch.from_numpy(output) for output in session.run(None, dict(inputs))]


def _compare_raw(session: Any, pixels: Tensor, raw: RawPredictions) -> Agreement:
    found = as_predictions(_run(session, {INPUT_NAME: pixels.numpy()}))
    return compare_decoded(decode_predictions(found), decode_predictions(raw))


def _compare_boxes(session: Any, pixels: Tensor, raw: RawPredictions) -> Agreement:
    scores, boxes_xyxy = _run(session, {INPUT_NAME: pixels.numpy()})
    return compare_decoded((scores, boxes_xyxy), decode_predictions(raw))


def _compare_detections(session: Any, pixels: Tensor, raw: RawPredictions) -> Agreement:
    """Against the server's own postprocessing; a box that one side lacks counts as infinitely far off."""
    options = CHECK_OPTIONS
    boxes_xyxy, scores, class_ids, batch_indices = _run(
        session,
        {
            INPUT_NAME: pixels.numpy(),
            "iou_threshold": np.array([options.iou_threshold], np.float32),
            "score_threshold": np.array([options.score_threshold], np.float32),
            "max_boxes_a_class": np.array([options.max_detections], np.int64),
        },
    )
    size_hw = (pixels.shape[2], pixels.shape[3])
    count = len(pixels)
    expected = postprocess(raw, [options] * count, [size_hw] * count, size_hw, options.max_detections)
    score_difference = box_difference_px = 0.0
    for index, wanted in enumerate(expected):
        mine = batch_indices == index
        boxes, ids = boxes_xyxy[mine].numpy(), class_ids[mine].numpy()
        # By class and place: nearly equal scores may change their order.
        order = np.lexsort((boxes[:, 0], ids))
        wanted_order = np.lexsort((wanted.boxes_xyxy[:, 0], wanted.class_ids))
        if not np.array_equal(ids[order], wanted.class_ids[wanted_order]):
            return Agreement(score_difference, float("inf"))
        if len(wanted):
            off_px = np.abs(boxes[order] - wanted.boxes_xyxy[wanted_order])
            off = np.abs(scores[mine].numpy()[order] - wanted.scores[wanted_order])
            box_difference_px = max(box_difference_px, float(off_px.max()))
            score_difference = max(score_difference, float(off.max()))
    return Agreement(score_difference, box_difference_px)


def sample_batches(model: DamoYolo, folder: Path) -> list[Tensor]:
    """The JPEG files of a folder as the server would feed them: together, and the first alone and smaller.

    Raises:
        FileNotFoundError: the folder has none.
    """
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    if not pictures:
        raise FileNotFoundError(f"no *.jpg in {folder}; scripts/render_smears.py draws some")
    config = ServingConfig(variant=model.variant.name)
    height, width = model.variant.input_size_hw
    batches = []
    for chosen, size_hw in ((pictures, (height, width)), (pictures[:1], (height // 64 * 32, width))):
        preprocessor = ImagePreprocessor(config, size_hw, torch.device("cpu"))
        batches.append(preprocessor.prepare(chosen).pixels.clone())
        preprocessor.close()
    return batches


def folded_network(weights: Path, variant: str | None, num_classes: int) -> DamoYolo:
    """The network that an archive of these weights, as trained, would hold.

    Raises:
        CheckpointError, ConfigError: they cannot be read, or do not fit.
    """
    with tempfile.TemporaryDirectory(prefix="folded-") as folder:
        packaged = Path(folder) / "packaged.pth"
        save_packaged(packaged, load_checkpoint(weights, variant, num_classes))
        return load_packaged(packaged)


def main(argv: Sequence[str] | None = None) -> int:
    """Export and check; nothing is left where the check fails."""
    arguments = _parser().parse_args(argv)
    try:
        weights = fetch_weights(arguments.weights, arguments.sha256)
        given = arguments.class_names
        class_names = read_class_names(given) if given else default_class_names(weights)
        model = folded_network(weights, arguments.variant, len(class_names))
        batches = sample_batches(model, arguments.pictures)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".exporting-", dir=arguments.output.parent) as folder:
            written = Path(folder) / arguments.output.name
            export_onnx(model, written, form=arguments.form, class_names=class_names)
            agreement = check_onnx(written, model, batches)
            written.replace(arguments.output)
    except (ExportError, WeightsError, DamoYoloError, OSError, ValueError, KeyError) as error:
        print(f"export_onnx: {error}", file=sys.stderr)
        return 1
    size_mb = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output}: DAMO-YOLO-{model.variant.name}, {arguments.form}, {size_mb:.1f} MB")
    print(
        f"beside PyTorch: scores within {agreement.score_difference:.1e}, "
        f"boxes within {agreement.box_difference_px:.1e} px"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--form", choices=FORMS, default="raw", help="what comes out (%(default)s)")
    parser.add_argument(
        "--weights",
        default=str(DEMO_WEIGHTS),
        help="file, https address or official name (default: the demo weights)",
    )
    parser.add_argument("--sha256", help="what the weights have to have, in hexadecimal")
    parser.add_argument("--variant", help="default: the one that the weights fit")
    parser.add_argument(
        "--class-names",
        type=Path,
        help="text (a name a line) or JSON file (default: the demo's for its weights, else COCO's 80)",
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        default=SAMPLE_PICTURES,
        help="folder of JPEG files to check with (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
