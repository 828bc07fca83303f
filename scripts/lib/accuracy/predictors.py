"""Detections of a data set, from a running server or from a detector in this process."""

from __future__ import annotations

import platform
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lib.accuracy.coco_metrics import CocoPrediction
from lib.accuracy.datasets import DetectionDataset
from lib.server.client import DetectionClient, RequestOptions

from damoyolo.detector import Detector
from damoyolo.structures import DetectionOptions


class EvaluationError(Exception):
    """The evaluation cannot be carried through; no figure would be right."""


class LabelledBox(NamedTuple):
    """A detection; box_xyxy in pixels of the image."""

    label: str
    score: float
    box_xyxy: Sequence[float]


# Detections of each image file, in the order of the files.
Predictor = Callable[[Sequence[Path]], Iterator[list[LabelledBox]]]


def server_predictor(client: DetectionClient, options: RequestOptions, in_flight: int) -> Predictor:
    """Detections by a running server, with `in_flight` requests at a time."""

    def predict(paths: Sequence[Path]) -> Iterator[list[LabelledBox]]:
        for outcome in client.detect_many(paths, options, in_flight):
            if outcome.answer is None:
                raise EvaluationError(f"{paths[outcome.index]}: {outcome.error}")
            yield [
                LabelledBox(found["label"], found["score"], found["bbox"])
                for found in outcome.answer["detections"]
            ]

    return predict


def in_process_predictor(
    archive: Path,
    options: RequestOptions,
    batch_size: int,
    device: str | None,
    precision: str | None,
    backend: str | None = None,
) -> tuple[Predictor, Sequence[str], dict[str, str]]:
    """Detections by a detector in this process.

    archive: .mar file, or the folder of an unpacked one. device: None takes a GPU where there is one.

    Returns the predictor, the detector's class names, and its device, backend and precision for the record.

    Raises:
        EvaluationError: the archive does not load, or the detector lacks one of the classes asked for.
    """
    import torch

    from lib.archive.reader import unpacked

    from damoyolo.detector import Detector
    from damoyolo.errors import DamoYoloError
    from damoyolo.structures import DetectionOptions

    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        with unpacked(archive) as model_dir:
            detector = Detector.from_archive_dir(model_dir, torch_device, precision, backend)
    except (DamoYoloError, OSError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"cannot load the detector of {archive}: {error}; scripts/build_archive.py builds an archive"
        ) from error
    names = detector.config.class_names
    if options.classes is not None:
        ids = match_labels(dict(enumerate(names)), options.classes)
    defaults = detector.config.default_options()
    detection_options = DetectionOptions(
        defaults.score_threshold if options.score_threshold is None else options.score_threshold,
        defaults.iou_threshold if options.iou_threshold is None else options.iou_threshold,
        defaults.max_detections if options.max_detections is None else options.max_detections,
        None if options.classes is None else tuple(ids.values()),
        bool(options.class_agnostic),
    )

    predict = detector_predictor(detector, detection_options, batch_size)
    hardware = torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else platform.machine()
    record = {
        "device": f"{torch_device} ({hardware})",
        "backend": detector.pipeline.name,
        "precision": detector.pipeline.precision,
    }
    return predict, names, record


def detector_predictor(detector: Detector, options: DetectionOptions, batch_size: int) -> Predictor:
    """Detections by a detector that is there already, so many images at a time."""
    from damoyolo.structures import Detections

    names = detector.config.class_names

    def predict(paths: Sequence[Path]) -> Iterator[list[LabelledBox]]:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            answers = detector.detect([path.read_bytes() for path in batch], [options] * len(batch))
            for path, found in zip(batch, answers, strict=True):
                if not isinstance(found, Detections):
                    raise EvaluationError(f"{path}: {found}")
                labels = [names[class_id] for class_id in found.class_ids]
                yield list(map(LabelledBox, labels, found.scores.tolist(), found.boxes_xyxy.tolist()))

    return predict


def match_labels(class_names: Mapping[int, str], labels: Iterable[str]) -> dict[str, int]:
    """The id in `class_names` of each label; upper and lower case do not matter.

    Raises:
        EvaluationError: a label is none of the class names; names them all.
    """
    ids = {name.casefold(): class_id for class_id, name in class_names.items()}
    distinct = dict.fromkeys(labels)
    unknown = [label for label in distinct if label.casefold() not in ids]
    if unknown:
        raise EvaluationError(
            f"no class is called {', '.join(unknown)}; there are {', '.join(class_names.values())}. "
            "--classes makes the detector look for some of its classes only"
        )
    return {label: ids[label.casefold()] for label in distinct}


def gather_predictions(
    dataset: DetectionDataset, predictor: Predictor, progress: bool | None
) -> tuple[list[CocoPrediction], float]:
    """Detections in all images in COCO form, and the seconds that took.

    progress: whether to show a bar on stderr; None shows it on a terminal.

    Raises:
        EvaluationError: an image failed, or a label is no class of the data set.
    """
    paths = [image.path for image in dataset.images]
    # Ahead of the clock: a cold start, and mistakes that every image would repeat.
    for boxes in islice(predictor(paths[:1]), 1):
        match_labels(dataset.class_names, (box.label for box in boxes))
    predictions: list[CocoPrediction] = []
    start_s = time.perf_counter()
    with tqdm(total=len(paths), unit="image", disable=None if progress is None else not progress) as bar:
        for image, boxes in zip(dataset.images, predictor(paths), strict=True):
            ids = match_labels(dataset.class_names, (box.label for box in boxes))
            for box in boxes:
                x1, y1, x2, y2 = box.box_xyxy
                predictions.append(
                    {
                        "image_id": image.image_id,
                        "category_id": ids[box.label],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": box.score,
                    }
                )
            bar.update()
    return predictions, time.perf_counter() - start_s


# What accuracy is stated for; `evaluate.py` has the same defaults.
EVALUATION_OPTIONS = DetectionOptions(score_threshold=0.05, iou_threshold=0.7, max_detections=500)
