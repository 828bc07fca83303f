"""Compare an ONNX file, run by ONNX Runtime, with the network in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lib.accuracy.parity import Agreement, compare_decoded
from lib.cli import ScriptError
from lib.images import read_images

from damoyolo.backends.onnx_metadata import INPUT_NAME, OUTPUT_NAMES, as_predictions
from damoyolo.boxes import decode_predictions
from damoyolo.config import ServingConfig
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.postprocess import postprocess
from damoyolo.preprocess import ImagePreprocessor
from damoyolo.structures import DetectionOptions, RawPredictions

SCORE_TOLERANCE, BOX_TOLERANCE_PX = 2e-5, 1e-2  # those of the golden outputs
CHECK_OPTIONS = DetectionOptions(score_threshold=0.25, iou_threshold=0.45, max_detections=100_000)


def check_onnx(path: Path, model: DamoYolo, batches: Sequence[Tensor]) -> Agreement:
    """Run a file in onnxruntime on the CPU and compare it with the network in PyTorch.

    batches: (B, 3, H, W) uint8 RGB each, of any size, H and W multiples of 32.

    Raises:
        ScriptError: a score, or a likely box, differs by more than the tolerance; says by how much.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    agreements = []
    for pixels in batches:
        with torch.inference_mode():
            raw = model(pixels.float())
        agreements.append(_compare(path, session, pixels, raw))
    agreement = Agreement(
        max(each.score_difference for each in agreements), max(each.box_difference_px for each in agreements)
    )
    # Negated, so that NaN is refused too.
    if not (
        agreement.score_difference <= SCORE_TOLERANCE and agreement.box_difference_px <= BOX_TOLERANCE_PX
    ):
        raise ScriptError(
            f"{path} differs from PyTorch by {agreement.score_difference:.2g} in a score and "
            f"{agreement.box_difference_px:.2g} px in a box; accepted are {SCORE_TOLERANCE:g} and "
            f"{BOX_TOLERANCE_PX:g} px"
        )
    return agreement


def _run(session: Any, inputs: Mapping[str, NDArray[Any]]) -> list[Tensor]:
    return [torch.from_numpy(output) for output in session.run(None, dict(inputs))]


def _compare(path: Path, session: Any, pixels: Tensor, raw: RawPredictions) -> Agreement:
    names = tuple(output.name for output in session.get_outputs())
    if names == ("boxes_xyxy", "scores", "class_ids", "batch_indices"):
        return _compare_detections(session, pixels, raw)
    if names not in (OUTPUT_NAMES, ("scores", "boxes_xyxy")):
        raise ScriptError(f"{path} has other outputs than those that scripts/export_onnx.py writes")
    found = _run(session, {INPUT_NAME: pixels.numpy()})
    decoded = decode_predictions(as_predictions(found)) if names == OUTPUT_NAMES else (found[0], found[1])
    return compare_decoded(decoded, decode_predictions(raw))


def _compare_detections(session: Any, pixels: Tensor, raw: RawPredictions) -> Agreement:
    """Compare with the server's postprocessing; a box that one side lacks is an infinite difference."""
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
        # Sorted by class and position, because nearly equal scores may change their order.
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
    """The JPEG files of a folder as the server would feed them: as one batch, and the first alone, smaller.

    Raises:
        FileNotFoundError: the folder has none.
    """
    images = read_images(folder)
    config = ServingConfig(variant=model.variant.name)
    height, width = model.variant.input_size_hw
    batches = []
    for chosen, size_hw in ((images, (height, width)), (images[:1], (height // 64 * 32, width))):
        preprocessor = ImagePreprocessor(config, size_hw, torch.device("cpu"))
        batches.append(preprocessor.prepare(chosen).pixels.clone())
        preprocessor.close()
    return batches
