"""The detector of the demo weights: stages in order, errors in their places, batch equals single."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE, Detector
from damoyolo.errors import ConfigError, CorruptImageError
from damoyolo.model.checkpoint import load_checkpoint, save_packaged
from damoyolo.pipeline import EagerPipeline
from damoyolo.structures import Detections

SETTINGS = {"variant": "S", "class_names": ["Platelets", "RBC", "WBC"], "precision": "fp32"}


@pytest.fixture(scope="module")
def archive_dir(project_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    save_packaged(
        folder / WEIGHTS_FILE, load_checkpoint(project_dir / "model_store/weights/damoyolo_s_bccd.pth")
    )
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump({"handler": SETTINGS}))
    return folder


@pytest.fixture(scope="module")
def detector(archive_dir: Path) -> Iterator[Detector]:
    detector = Detector.from_archive_dir(archive_dir)
    yield detector
    detector.close()


@pytest.fixture(scope="module")
def images(project_dir: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((project_dir / "tests/data/smears").glob("*.jpg"))]


def assert_equal(found: object, expected: object, score_tolerance: float, box_tolerance_px: float) -> None:
    assert isinstance(found, Detections)
    assert isinstance(expected, Detections)
    assert found.image_size_hw == expected.image_size_hw
    assert len(found) == len(expected) > 0
    # Nearly equal scores may change places.
    orders = [np.lexsort((each.boxes_xyxy[:, 0], each.class_ids)) for each in (found, expected)]
    np.testing.assert_array_equal(found.class_ids[orders[0]], expected.class_ids[orders[1]])
    np.testing.assert_allclose(found.scores[orders[0]], expected.scores[orders[1]], atol=score_tolerance)
    np.testing.assert_allclose(
        found.boxes_xyxy[orders[0]], expected.boxes_xyxy[orders[1]], atol=box_tolerance_px
    )


def test_a_batch_equals_its_images_alone_and_a_corrupt_neighbour_costs_only_itself(
    detector: Detector, images: list[bytes]
) -> None:
    options = detector.config.default_options()
    batch = [images[0], images[1][:4000], images[1], b"", images[2]]
    outcomes = detector.detect(batch, [options] * 5)
    assert isinstance(outcomes[1], CorruptImageError)
    assert outcomes[3].__class__.__name__ == "UnsupportedImageError"
    for slot, image in ((0, images[0]), (2, images[1]), (4, images[2])):
        assert_equal(outcomes[slot], detector.detect([image], [options])[0], 1e-5, 1e-2)


def test_a_batch_of_bad_images_only_and_an_empty_one_are_answered(detector: Detector) -> None:
    options = detector.config.default_options()
    assert len(detector.detect([b"x", b"y"], [options] * 2)) == 2
    assert detector.detect([], []) == []


def test_the_stages_run_in_order_and_without_images_only_the_first(
    detector: Detector, images: list[bytes]
) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def time_stage(stage: str) -> Iterator[None]:
        seen.append(stage)
        yield

    options = [detector.config.default_options()]
    detector.detect(images[:1], options, time_stage)
    detector.detect([b"x"], options, time_stage)
    assert seen == ["preprocess", "network", "postprocess", "preprocess"]


def test_warming_up_runs_every_batch_size(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    pipeline = detector.pipeline
    assert isinstance(pipeline, EagerPipeline)
    backend: Any = pipeline.backend
    monkeypatch.setattr(pipeline, "backend", lambda pixels: seen.append(len(pixels)) or backend(pixels))
    detector.warm_up((1, 2))
    assert seen == [1, 2]


def test_settings_that_do_not_fit_the_weights_are_refused(archive_dir: Path) -> None:
    for change in ({"class_names": ["one"]}, {"variant": "T"}):
        with pytest.raises(ConfigError, match="build the archive anew"):
            Detector.from_settings({**SETTINGS, **change}, archive_dir / WEIGHTS_FILE, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("precision", "score_tolerance", "box_tolerance_px"),
    # Float32 too: nvJPEG repeats the pixels of the colour planes where the CPU's decoder blends them.
    [("fp32", 0.02, 1.0), ("tf32", 0.02, 1.0), ("amp", 0.02, 1.0), ("fp16", 0.02, 1.0), ("bf16", 0.05, 5.0)],
)
def test_a_gpu_finds_what_the_cpu_finds(
    archive_dir: Path,
    detector: Detector,
    images: list[bytes],
    precision: str,
    score_tolerance: float,
    box_tolerance_px: float,
) -> None:
    options = [detector.config.default_options()] * len(images)
    on_gpu = Detector.from_archive_dir(archive_dir, "cuda", precision)
    expected = detector.detect(images, options)
    for found, wanted in zip(on_gpu.detect(images, options), expected, strict=True):
        assert_equal(found, wanted, score_tolerance, box_tolerance_px)
    on_gpu.close()
