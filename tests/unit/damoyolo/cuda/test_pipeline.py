"""The recorded detector on a GPU beside the plain one with the same arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from damoyolo.cuda.pipeline import GraphPipeline
from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE, Detector
from damoyolo.model.checkpoint import load_checkpoint, save_packaged
from damoyolo.pipeline import EagerPipeline
from damoyolo.structures import DetectionOptions, Detections

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Kernels of another shape round fp16 sums differently.
SCORE_TOLERANCE, BOX_TOLERANCE_PX = 0.02, 1.5


@pytest.fixture(scope="module")
def model_dir(project_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    save_packaged(
        folder / WEIGHTS_FILE, load_checkpoint(project_dir / "model_store/weights/damoyolo_s_bccd.pth")
    )
    settings = {
        "variant": "S",
        "class_names": ["Platelets", "RBC", "WBC"],
        "precision": "fp16",
        "graph_batch_sizes": [1, 4],
    }
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump({"handler": settings}))
    return folder


def detector_with(model_dir: Path, **changes: object) -> Detector:
    settings = yaml.safe_load((model_dir / SETTINGS_FILE).read_text())["handler"]
    return Detector.from_settings({**settings, **changes}, model_dir / WEIGHTS_FILE, torch.device("cuda"))


@pytest.fixture(scope="module")
def plain(model_dir: Path) -> Iterator[Detector]:
    detector = detector_with(model_dir, cuda_graphs=False)
    assert isinstance(detector.pipeline, EagerPipeline)
    yield detector
    detector.close()


@pytest.fixture(scope="module")
def recorded(model_dir: Path) -> Iterator[Detector]:
    detector = detector_with(model_dir)
    assert isinstance(detector.pipeline, GraphPipeline)
    yield detector
    detector.close()


@pytest.fixture(scope="module")
def images(project_dir: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((project_dir / "tests/data/smears").glob("*.jpg"))]


def assert_close(found: object, expected: object, score_threshold: float) -> None:
    """The same detections; one whose score is nearly the threshold may be there in one alone."""
    assert isinstance(found, Detections)
    assert isinstance(expected, Detections)
    assert found.image_size_hw == expected.image_size_hw
    assert list(found.scores) == sorted(found.scores, reverse=True)
    for these, others in ((found, expected), (expected, found)):
        for class_id, score, box in zip(these.class_ids, these.scores, these.boxes_xyxy, strict=True):
            same_class = others.class_ids == class_id
            off_px = np.abs(others.boxes_xyxy[same_class] - box).max(axis=1)
            nearest = off_px.argmin() if len(off_px) else None
            if nearest is None or off_px[nearest] > BOX_TOLERANCE_PX:
                assert score <= score_threshold + SCORE_TOLERANCE, (class_id, score, box)
            else:
                assert abs(others.scores[same_class][nearest] - score) <= SCORE_TOLERANCE


def test_every_batch_size_finds_what_the_plain_detector_finds(
    recorded: Detector, plain: Detector, images: list[bytes]
) -> None:
    for batch_size in (1, 2, 3, 4, 5, 9, 1):  # exact, padded, and cut up
        batch = [images[index % 3] for index in range(batch_size)]
        options = [plain.config.default_options()] * batch_size
        outcomes = recorded.detect(batch, options)
        for found, expected in zip(outcomes, plain.detect(batch, options), strict=True):
            assert isinstance(found, Detections)
            assert len(found) > 10
            assert_close(found, expected, 0.25)


def test_options_differ_within_a_batch(recorded: Detector, plain: Detector, images: list[bytes]) -> None:
    options = [
        DetectionOptions(0.5, 0.45, 300),
        DetectionOptions(0.05, 0.9, 300),
        DetectionOptions(0.25, 0.45, 3, class_ids=(1,)),
        DetectionOptions(0.05, 0.1, 300, class_agnostic=True),
    ]
    batch = [*images, images[0]]
    outcomes = recorded.detect(batch, options)
    for found, expected, asked in zip(outcomes, plain.detect(batch, options), options, strict=True):
        assert isinstance(found, Detections)
        assert len(found) <= asked.max_detections
        if asked.max_detections == 300 and asked.iou_threshold < 0.9:
            assert_close(found, expected, asked.score_threshold)
    limited = outcomes[2]
    assert isinstance(limited, Detections)
    assert set(limited.class_ids) == {1}
    assert len(limited) == 3


def test_more_candidates_than_the_fixed_shapes_hold_are_all_considered(
    recorded: Detector, plain: Detector, images: list[bytes]
) -> None:
    options = [DetectionOptions(0.0005, 0.7, 1000), plain.config.default_options()]
    batch = images[:2]
    for found, expected, asked in zip(
        recorded.detect(batch, options), plain.detect(batch, options), options, strict=True
    ):
        assert isinstance(found, Detections)
        assert isinstance(expected, Detections)
        assert abs(len(found) - len(expected)) <= 0.05 * len(expected) + 1
        likely = found.scores > 0.3
        assert likely.sum() == (expected.scores > 0.3).sum() or asked.score_threshold > 0.2


def test_a_corrupt_neighbour_and_other_formats_share_a_recorded_batch(
    recorded: Detector, plain: Detector, images: list[bytes]
) -> None:
    from PIL import Image

    from doubles.answers import encode

    png = encode(Image.linear_gradient("L").convert("RGB"), "PNG")
    batch = [images[0], images[1][:5000], png, b"nothing", images[2]]
    options = [plain.config.default_options()] * len(batch)
    outcomes = recorded.detect(batch, options)
    for found, expected in zip(outcomes, plain.detect(batch, options), strict=True):
        assert type(found) is type(expected)
        if isinstance(found, Detections):
            assert_close(found, expected, 0.25)


def test_a_detector_without_gpu_jpeg_decoding_finds_the_same(
    model_dir: Path, plain: Detector, images: list[bytes]
) -> None:
    detector = detector_with(model_dir, gpu_jpeg_decoding=False)
    options = [plain.config.default_options()] * 3
    for found, expected in zip(detector.detect(images, options), plain.detect(images, options), strict=True):
        assert isinstance(found, Detections)
        assert isinstance(expected, Detections)
        assert abs(len(found) - len(expected)) <= 1
    detector.close()
