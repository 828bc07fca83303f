"""Compute the COCO average precision (AP) of predictions on an annotated data set, with pycocotools.

AP is the precision averaged over 101 recall levels, the IoU thresholds 0.50, 0.55 .. 0.95 and the classes
that have objects, using the 100 best boxes of each image (Lin et al., Microsoft COCO, 2014).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from lib.accuracy.datasets import DetectionDataset
from lib.cli import ScriptError

MAX_BOXES_PER_IMAGE = 100
RECALL_LEVELS = np.linspace(0.0, 1.0, 101)
IOU_50, IOU_75 = 0, 5  # rows of the ten IoU thresholds 0.50, 0.55 .. 0.95


class MetricsError(ScriptError):
    """There is nothing to compute a metric from.

    A class of its own because the search for layers to quantize counts it as an AP of 0.
    """


class CocoPrediction(TypedDict):
    """A detection in COCO's results format; bbox is x, y, width, height in pixels."""

    image_id: int
    category_id: int
    bbox: list[float]
    score: float


class AveragePrecision(NamedTuple):
    """AP over all IoU thresholds, at 0.50 and at 0.75, each 0..1."""

    ap: float
    ap50: float
    ap75: float


@dataclass(frozen=True)
class CocoMetrics:
    """Metrics of all classes together and of each class that has objects.

    per_class: by class name.
    precision: by class name; (10, 101) float64, at the ten IoU thresholds and at RECALL_LEVELS.
    """

    overall: AveragePrecision
    per_class: dict[str, AveragePrecision]
    precision: dict[str, NDArray[np.float64]]


def compute_metrics(dataset: DetectionDataset, predictions: Sequence[CocoPrediction]) -> CocoMetrics:
    """COCO metrics of `predictions`, which use the image and category ids of `dataset`.

    Raises:
        MetricsError: there are no images, no objects or no predictions.
    """
    from pycocotools.cocoeval import COCOeval  # here, because commands that compare networks import this file

    if not dataset.images:
        raise MetricsError(f"the data set {dataset.name} has no images")
    if not any(not found.ignored for image in dataset.images for found in image.objects):
        raise MetricsError(f"the {len(dataset.images)} images of {dataset.name} have no objects to find")
    if not predictions:
        raise MetricsError(
            f"nothing was detected in the {len(dataset.images)} images of {dataset.name}; lower "
            "--score-threshold, or check whether the weights were trained on these classes"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports each step on stdout
        truth = _ground_truth(dataset)
        # loadRes changes its argument.
        results = truth.loadRes([{**prediction} for prediction in predictions])
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.params.maxDets = [MAX_BOXES_PER_IMAGE]
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    tables = evaluation.eval["precision"][..., 0, 0]  # 10, 101, K
    precision = {
        dataset.class_names[category_id]: np.asarray(tables[:, :, index], dtype=np.float64)
        for index, category_id in enumerate(evaluation.params.catIds)
        if tables[0, 0, index] >= 0  # -1 marks a class without objects
    }
    return CocoMetrics(
        overall=_average(np.stack(list(precision.values()))),
        per_class={name: _average(table[None]) for name, table in precision.items()},
        precision=precision,
    )


def plot_precision_recall(metrics: CocoMetrics, title: str, path: Path) -> None:
    """Plot precision against recall of each class, at IoU 0.50 and 0.75, into an image file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.add_subplot()
    many = len(metrics.precision) > 10
    for index, (name, table) in enumerate(metrics.precision.items()):
        ap = metrics.per_class[name]
        # The colour cycle has ten entries; with more classes only the mean gets a legend.
        colour, width = ("0.8", 0.6) if many else (f"C{index}", 1.8)
        label50, label75 = (
            (None, None) if many else (f"{name}, AP50 {ap.ap50:.3f}", f"{name}, AP75 {ap.ap75:.3f}")
        )
        axes.plot(RECALL_LEVELS, table[IOU_50], color=colour, linewidth=width, label=label50)
        axes.plot(RECALL_LEVELS, table[IOU_75], "--", color=colour, linewidth=width, label=label75)
    mean = np.mean(list(metrics.precision.values()), axis=0)
    axes.plot(RECALL_LEVELS, mean[IOU_50], color="black", label=f"mean, AP50 {metrics.overall.ap50:.3f}")
    axes.plot(
        RECALL_LEVELS, mean[IOU_75], "--", color="black", label=f"mean, AP75 {metrics.overall.ap75:.3f}"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title(f"{title}: AP {metrics.overall.ap:.3f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def _ground_truth(dataset: DetectionDataset) -> Any:
    """The data set as a COCO object of pycocotools."""
    from pycocotools.coco import COCO

    annotations: list[dict[str, Any]] = []
    for image in dataset.images:
        for found in image.objects:
            x1, y1, x2, y2 = found.box_xyxy
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 means "not matched"
                    "image_id": image.image_id,
                    "category_id": found.category_id,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(found.ignored),
                }
            )
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": image.image_id} for image in dataset.images],
        "categories": [
            {"id": category_id, "name": name} for category_id, name in dataset.class_names.items()
        ],
        "annotations": annotations,
    }
    truth.createIndex()
    return truth


def _average(tables: NDArray[np.float64]) -> AveragePrecision:
    """tables: (K, 10, 101) precision of K classes."""
    return AveragePrecision(
        ap=float(tables.mean()), ap50=float(tables[:, IOU_50].mean()), ap75=float(tables[:, IOU_75].mean())
    )
