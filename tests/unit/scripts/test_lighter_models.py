"""The lighter models, end to end: trained weights, archive, detections."""

import json

import pytest
import torch

from lib.archive.reader import load_detector
from lib.packaging.builder import ArchiveRequest, build_archive
from lib.packaging.class_names import DEMO_CLASS_NAMES

from damoyolo.model.variants import VARIANTS
from damoyolo.structures import Detections
from doubles.answers import iou


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["T", "Nm", "Ns"])
def test_an_archive_of_a_lighter_model_finds_the_cells_of_a_drawn_smear(
    shared_dir, project_dir, tmp_path, variant
):
    report = build_archive(
        ArchiveRequest(
            weights=str(shared_dir / "weights" / f"damoyolo_{variant.lower()}_bccd.pth"),
            class_names=DEMO_CLASS_NAMES,
            output_dir=tmp_path,
        )
    )
    assert report.variant == variant  # found from the weights
    detector = load_detector(report.path, torch.device("cpu"))
    assert detector.input_size_hw == VARIANTS[variant].input_size_hw
    smear = project_dir / "tests/data/smears/smear_3.jpg"
    (found,) = detector.detect([smear.read_bytes()], [detector.config.default_options()])
    detector.close()
    assert isinstance(found, Detections)
    cells = json.loads(smear.with_suffix(".json").read_text())
    labels = [DEMO_CLASS_NAMES[class_id] for class_id in found.class_ids]
    for label, *box in cells:
        best = max(
            iou(box, other) for name, other in zip(labels, found.boxes_xyxy, strict=True) if name == label
        )
        assert best > 0.35, (label, box)  # as of the demo's model, tests/integration/test_prediction.py
    assert len(labels) <= len(cells) + 3
