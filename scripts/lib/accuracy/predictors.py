"""Detect objects in the images of a data set, with a running server or a detector in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lib.accuracy.coco_metrics import CocoPrediction
from lib.accuracy.datasets import DetectionDataset
from lib.cli import ScriptError

from damoyolo.detector import Detector
from damoyolo.structures import DetectionOptions, Detections
from damoyolo_client.client import Client, RequestOptions

# All published accuracies use these; they are also the defaults of `evaluate.py`.
EVALUATION_OPTIONS = DetectionOptions(score_threshold=0.05, iou_threshold=0.7, max_detections=500)


class LabelledBox(NamedTuple):
    """A detection; box_xyxy in pixels of the image."""

    label: str
    score: float
    box_xyxy: Sequence[float]


# Yields the detections of each image file, in the order of the files.
Predictor = Callable[[Sequence[Path]], Iterator[list[LabelledBox]]]


def server_predictor(client: Client, options: RequestOptions, in_flight: int) -> Predictor:
    """Detects with a running server, with up to `in_flight` requests at a time."""

    def predict(paths: Sequence[Path]) -> Iterator[list[LabelledBox]]:
        for outcome in client.detect_many(paths, options, in_flight):
            if outcome.answer is None:
                raise ScriptError(f"{paths[outcome.index]}: {outcome.error}")
            yield [
                LabelledBox(found["label"], found["score"], found["bbox"])
                for found in outcome.answer["detections"]
            ]

    return predict


def detector_predictor(detector: Detector, options: DetectionOptions, batch_size: int) -> Predictor:
    """Detects with a detector in this process, in batches of `batch_size` images."""
    names = detector.config.class_names

    def predict(paths: Sequence[Path]) -> Iterator[list[LabelledBox]]:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            answers = detector.detect([path.read_bytes() for path in batch], [options] * len(batch))
            for path, found in zip(batch, answers, strict=True):
                if not isinstance(found, Detections):
                    raise ScriptError(f"{path}: {found}")
                labels = [names[class_id] for class_id in found.class_ids]
                yield list(map(LabelledBox, labels, found.scores.tolist(), found.boxes_xyxy.tolist()))

    return predict


def match_labels(class_names: Mapping[int, str], labels: Iterable[str]) -> dict[str, int]:
    """The id in `class_names` of each label, ignoring case.

    Raises:
        ScriptError: labels that are not class names; the message lists all of them.
    """
    ids = {name.casefold(): class_id for class_id, name in class_names.items()}
    distinct = dict.fromkeys(labels)
    unknown = [label for label in distinct if label.casefold() not in ids]
    if unknown:
        raise ScriptError(
            f"no class is called {', '.join(unknown)}; there are {', '.join(class_names.values())}. "
            "--classes restricts the detector to some of its classes"
        )
    return {label: ids[label.casefold()] for label in distinct}


def gather_predictions(
    dataset: DetectionDataset, predictor: Predictor, progress: bool | None
) -> tuple[list[CocoPrediction], float]:
    """The detections in all images in COCO format, and the time taken in seconds.

    progress: whether to show a progress bar on stderr; None shows it on a terminal.

    Raises:
        ScriptError: an image failed, or a label is not a class of the data set.
    """
    paths = [image.path for image in dataset.images]
    # Before the clock starts: warm up, and find mistakes that every image would repeat.
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
