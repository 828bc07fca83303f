"""Predictions for a data set: whose error it was, and how they become COCO's."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.accuracy.datasets import AnnotatedImage, DetectionDataset
from lib.accuracy.predictors import (
    EVALUATION_OPTIONS,
    LabelledBox,
    detector_predictor,
    gather_predictions,
    match_labels,
)
from lib.cli import ScriptError

from damoyolo.config import ServingConfig
from damoyolo.errors import CorruptImageError

DATASET = DetectionDataset(
    "cells",
    {3: "RBC", 7: "WBC"},
    tuple(AnnotatedImage(image_id, Path(f"{image_id}.jpg"), ()) for image_id in (5, 6)),
    0,
)


def test_predictions_have_the_ids_of_the_data_set_whatever_the_case_of_the_labels():
    def predict(paths):
        for path in paths:
            yield [LabelledBox("wbc", 0.5, (1, 2, 11, 22))] if path.name == "6.jpg" else []

    predictions, seconds = gather_predictions(DATASET, predict, progress=False)
    assert predictions == [{"image_id": 6, "category_id": 7, "bbox": [1, 2, 10, 20], "score": 0.5}]
    assert seconds > 0


def test_labels_that_the_data_set_does_not_have_are_all_named():
    with pytest.raises(ScriptError, match=r"no class is called cat, dog; there are RBC, WBC"):
        match_labels(DATASET.class_names, ["cat", "rbc", "dog", "cat"])


def test_an_error_of_the_detector_names_the_image(tmp_path):
    def detect(images, _options):
        return [CorruptImageError("cut off")] * len(images)

    (tmp_path / "a.jpg").touch()
    detector = SimpleNamespace(config=ServingConfig(class_names=("RBC",)), detect=detect)
    with pytest.raises(ScriptError, match=r"a\.jpg: cut off"):
        list(detector_predictor(detector, EVALUATION_OPTIONS, 1)([tmp_path / "a.jpg"]))
