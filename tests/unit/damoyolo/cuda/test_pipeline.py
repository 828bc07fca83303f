"""The detector with CUDA graphs against the one without, in the same precision."""

import numpy as np
import pytest
import torch

from damoyolo.cuda.pipeline import GraphPipeline
from damoyolo.detector import WEIGHTS_FILE, Detector
from damoyolo.pipeline import EagerPipeline
from damoyolo.structures import DetectionOptions, Detections

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Kernels of another shape round fp16 sums differently.
SCORE_TOLERANCE, BOX_TOLERANCE_PX = 0.02, 1.5


@pytest.fixture(scope="module")
def open_detector(demo_settings, demo_archive_dir):
    """Opens the demo weights on CUDA in fp16; settings as keywords."""

    def open_it(**changes):
        settings = {**demo_settings, "precision": "fp16", "graph_batch_sizes": [1, 4], **changes}
        return Detector.from_settings(settings, demo_archive_dir / WEIGHTS_FILE, torch.device("cuda"))

    return open_it


@pytest.fixture(scope="module")
def plain(open_detector):
    detector = open_detector(cuda_graphs=False)
    assert isinstance(detector.pipeline, EagerPipeline)
    yield detector
    detector.close()


@pytest.fixture(scope="module")
def captured(open_detector):
    detector = open_detector()
    assert isinstance(detector.pipeline, GraphPipeline)
    yield detector
    detector.close()


def assert_close(found, expected, score_threshold):
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


def test_every_batch_size_finds_what_the_plain_detector_finds(captured, plain, smears):
    for batch_size in (1, 2, 3, 4, 5, 9, 1):  # exact, padded, and cut up
        batch = [smears[index % 3] for index in range(batch_size)]
        options = [plain.config.default_options()] * batch_size
        outcomes = captured.detect(batch, options)
        for found, expected in zip(outcomes, plain.detect(batch, options), strict=True):
            assert isinstance(found, Detections)
            assert len(found) > 10
            assert_close(found, expected, 0.25)


def test_options_differ_within_a_batch(captured, plain, smears):
    options = [
        DetectionOptions(0.5, 0.45, 300),
        DetectionOptions(0.05, 0.9, 300),
        DetectionOptions(0.25, 0.45, 3, class_ids=(1,)),
        DetectionOptions(0.05, 0.1, 300, class_agnostic=True),
    ]
    batch = [*smears, smears[0]]
    outcomes = captured.detect(batch, options)
    for found, expected, option in zip(outcomes, plain.detect(batch, options), options, strict=True):
        assert isinstance(found, Detections)
        assert len(found) <= option.max_detections
        if option.max_detections == 300 and option.iou_threshold < 0.9:
            assert_close(found, expected, option.score_threshold)
    limited = outcomes[2]
    assert isinstance(limited, Detections)
    assert set(limited.class_ids) == {1}
    assert len(limited) == 3


def test_more_candidates_than_the_fixed_shapes_hold_are_all_considered(captured, plain, smears):
    options = [DetectionOptions(0.0005, 0.7, 1000), plain.config.default_options()]
    batch = smears[:2]
    for found, expected, option in zip(
        captured.detect(batch, options), plain.detect(batch, options), options, strict=True
    ):
        assert isinstance(found, Detections)
        assert isinstance(expected, Detections)
        assert abs(len(found) - len(expected)) <= 0.05 * len(expected) + 1
        likely = found.scores > 0.3
        assert likely.sum() == (expected.scores > 0.3).sum() or option.score_threshold > 0.2


def test_a_corrupt_neighbour_and_other_formats_share_a_captured_batch(captured, plain, smears):
    from PIL import Image

    from doubles.images import encode

    png = encode(Image.linear_gradient("L").convert("RGB"), "PNG")
    batch = [smears[0], smears[1][:5000], png, b"nothing", smears[2]]
    options = [plain.config.default_options()] * len(batch)
    outcomes = captured.detect(batch, options)
    for found, expected in zip(outcomes, plain.detect(batch, options), strict=True):
        assert type(found) is type(expected)
        if isinstance(found, Detections):
            assert_close(found, expected, 0.25)


def test_a_detector_without_gpu_jpeg_decoding_finds_the_same(open_detector, plain, smears):
    detector = open_detector(gpu_jpeg_decoding=False)
    options = [plain.config.default_options()] * 3
    for found, expected in zip(detector.detect(smears, options), plain.detect(smears, options), strict=True):
        assert isinstance(found, Detections)
        assert isinstance(expected, Detections)
        assert abs(len(found) - len(expected)) <= 1
    detector.close()


def test_detectors_that_take_turns_find_the_same_and_an_error_gives_the_turn_back(
    open_detector, captured, smears
):
    in_turn, other = open_detector(device_turns=1), open_detector(device_turns=1)
    options = [captured.config.default_options()] * 5
    batch = [smears[index % 3] for index in range(5)]  # more than is captured: two parts
    for found, expected in zip(in_turn.detect(batch, options), captured.detect(batch, options), strict=True):
        assert_close(found, expected, 0.25)
    with pytest.raises(TypeError):
        in_turn.detect([*batch[:4], None], options)  # the second part fails while the first is computed
    assert all(isinstance(found, Detections) for found in other.detect(batch, options))
    in_turn.close()
    other.close()
