"""The comparison with PyTorch: right backends pass, silently wrong ones do not."""

import copy
import dataclasses

import pytest
import torch

from lib.accuracy import parity
from lib.accuracy.datasets import AnnotatedImage, AnnotatedObject, DetectionDataset
from lib.accuracy.parity import Parity, ParityReport, compare
from lib.accuracy.tolerances import TOLERANCES
from lib.archive.reader import load_detector
from lib.cli import ScriptError
from lib.paths import SAMPLE_IMAGES

from damoyolo.pipeline import EagerPipeline
from damoyolo.structures import RawPredictions
from doubles.wrong_backends import WRONG_BACKENDS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference(demo_archive_dir):
    """Runs the network once for each batch of pixels. The wrong backends change copies of its predictions."""
    detector = load_detector(demo_archive_dir, CPU, backend="pytorch", input_size_hw=[320, 320])
    backend, known = detector.pipeline.backend, {}

    def remember(pixels):
        key = pixels.shape, pixels.numpy().tobytes()
        if key not in known:
            known[key] = backend(pixels)
        return known[key]

    yield with_backend(detector, lambda raw: raw, run=remember)
    detector.close()


def with_backend(detector, change, precision="fp32", run=None):
    """The same detector with another backend, which changes the right predictions."""

    def changed(pixels):
        return change((run or detector.raw_predictions)(pixels))

    changed.name, changed.device, changed.precision = "changed", detector.device, precision
    other = copy.copy(detector)
    other.pipeline = EagerPipeline(changed, detector.input_size_hw, detector.config.max_candidates)
    return other


@pytest.fixture(scope="module")
def dataset(reference):
    """The reference's detections with a score of at least 0.5, as truth."""
    found = []
    options = dataclasses.replace(reference.config.default_options(), score_threshold=0.5)
    for image_id, path in enumerate(sorted(SAMPLE_IMAGES.glob("*.jpg"))):
        (detections,) = reference.detect([path.read_bytes()], [options])
        pairs = zip(detections.class_ids.tolist(), detections.boxes_xyxy.tolist(), strict=True)
        found.append(
            AnnotatedImage(image_id, path, tuple(AnnotatedObject(kind, tuple(box)) for kind, box in pairs))
        )
    return DetectionDataset("smears", dict(enumerate(reference.config.class_names)), tuple(found), 0)


def test_a_right_backend_passes_and_ap_is_compared(reference, smears, dataset):
    same = with_backend(reference, lambda raw: raw)
    report = compare(reference, same, smears, [1, 4], TOLERANCES["fp32"], dataset)
    report.require_passed()
    assert [each.batch_size for each in report.parities] == [1, 4]
    assert report.ap == report.reference_ap
    assert report.ap is not None
    assert report.ap > 0.8


def test_rounding_passes_as_float16_and_not_as_float32(reference, smears):
    def rounded(raw):
        return RawPredictions(*(tuple(level.half().float() for level in side) for side in raw))

    for precision, passes in (("fp16", True), ("fp32", False)):
        candidate = with_backend(reference, rounded, precision)
        report = compare(reference, candidate, smears, [1], TOLERANCES[precision])
        assert (report.failures() == []) is passes, report.lines()


@pytest.mark.parametrize("precision", ["fp16", "int8"])  # the tolerances of float32 are tighter
@pytest.mark.parametrize("name", WRONG_BACKENDS)
def test_a_silently_wrong_backend_is_refused(reference, smears, dataset, name, precision):
    if name == "logits too low" and precision == "int8":
        pytest.skip("within the tolerance of int8")
    candidate = with_backend(reference, WRONG_BACKENDS[name], precision)
    truth = dataset if precision == "int8" else None  # check_parity requires one for int8
    report = compare(reference, candidate, smears[:2], [1, 3], TOLERANCES[precision], truth)
    with pytest.raises(ScriptError, match="differs from PyTorch in float32"):
        report.require_passed()
    if name == "wrong in batches alone":
        assert all(failure.startswith("batch size 3") for failure in report.failures())


def test_no_two_images_of_a_batch_are_equal():
    pixels = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    for needed, count in ((1, 3), (5, 5), (32, 32), (100, 48)):
        varied = parity.with_variations(pixels, needed)
        assert len(varied.flatten(1).unique(dim=0)) == len(varied) == count
        assert torch.equal(varied[:3], pixels)


def test_a_lost_class_is_noticed_even_if_no_image_shows_it(reference, smears):
    report = compare(
        reference,
        with_backend(reference, WRONG_BACKENDS["a rare class lost"]),
        smears,
        [1],
        dataclasses.replace(TOLERANCES["fp32"], score=1.0),
    )
    assert [failure for failure in report.failures() if "logit_noise" in failure]


def test_lower_ap_alone_is_refused(reference, smears, dataset):
    loose = dataclasses.replace(TOLERANCES["int8"], score=1.0, box_px=1e3, logit_noise=1e3)
    candidate = with_backend(reference, WRONG_BACKENDS["a common class lost"], "int8")
    report = compare(reference, candidate, smears, [1], loose, dataset)
    (failure,) = report.failures()
    assert failure.startswith("AP is")


def test_nan_exceeds_every_tolerance():
    nan = float("nan")
    report = ParityReport("fp32", TOLERANCES["fp32"], (Parity(1, nan, nan, nan),), (), 0.5, nan)
    assert len(report.failures()) == 4


def test_images_without_objects_are_refused(reference, monkeypatch, smears):
    monkeypatch.setattr(parity, "SEEN_SCORE", 0.999)
    with pytest.raises(ScriptError, match="detects nothing in the 1 images"):
        compare(reference, reference, smears[:1], [1], TOLERANCES["fp32"])


def test_an_image_that_cannot_be_read_is_named(reference, smears):
    with pytest.raises(ScriptError, match="image 2"):
        compare(reference, reference, [smears[0], b"x"], [1], TOLERANCES["fp32"])


def test_decoded_predictions_differ_by_the_worst_score_and_the_worst_likely_box():
    scores = torch.tensor([[[0.9, 0.1], [0.01, 0.02]]])  # B, A, K
    boxes_xyxy = torch.zeros(1, 2, 4)
    found = scores + torch.tensor([0.0, 0.05]), boxes_xyxy + torch.tensor([[2.0], [7.0]])
    agreement = parity.compare_decoded(found, (scores, boxes_xyxy))
    assert agreement.score_difference == pytest.approx(0.05)
    assert agreement.box_difference_px == 2.0
    nothing_likely = parity.compare_decoded(found, (scores * 0, boxes_xyxy))
    assert nothing_likely.box_difference_px == 0.0
