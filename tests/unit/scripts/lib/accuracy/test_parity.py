"""The comparison with PyTorch: right backends pass, silently wrong ones do not."""

import copy
import dataclasses

import pytest
import torch
import yaml

from lib.accuracy import parity
from lib.accuracy.datasets import AnnotatedImage, AnnotatedObject, DetectionDataset
from lib.accuracy.parity import Parity, ParityReport, compare
from lib.accuracy.tolerances import TOLERANCES
from lib.cli import ScriptError

from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE, Detector
from damoyolo.model.checkpoint import load_checkpoint, save_packaged
from damoyolo.pipeline import EagerPipeline
from damoyolo.structures import Detections, RawPredictions
from doubles.wrong_backends import WRONG_BACKENDS

NAMES = ["Platelets", "RBC", "WBC"]
SETTINGS = {
    "class_names": NAMES,
    "backend": "pytorch",
    "precision": "fp32",
    "input_size_hw": [320, 320],
}


@pytest.fixture(scope="module")
def archive_dir(project_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    weights = load_checkpoint(project_dir / "model_store/weights/damoyolo_s_bccd.pth")
    save_packaged(folder / WEIGHTS_FILE, weights)
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump({"handler": SETTINGS}))
    return folder


class RememberingBackend:
    """Runs a backend once for each batch of pixels. The wrong backends change copies of its predictions."""

    def __init__(self, backend):
        self._backend = backend
        self._known = {}
        self.name, self.device, self.precision = backend.name, backend.device, backend.precision

    def __call__(self, pixels):
        key = pixels.shape, pixels.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self._backend(pixels)
        return self._known[key]


@pytest.fixture(scope="module")
def reference(archive_dir):
    detector = Detector.from_archive_dir(archive_dir)
    assert isinstance(detector.pipeline, EagerPipeline)
    detector.pipeline.backend = RememberingBackend(detector.pipeline.backend)
    yield detector
    detector.close()


@pytest.fixture(scope="module")
def image_dir(project_dir):
    return project_dir / "tests/data/smears"


@pytest.fixture(scope="module")
def images(image_dir):
    return [path.read_bytes() for path in sorted(image_dir.glob("*.jpg"))]


def with_backend(detector, change, precision="fp32"):
    """The same detector with another backend, which changes the right predictions."""

    class Changed:
        name = "changed"
        device = detector.device

        def __init__(self):
            self.precision = precision

        def __call__(self, pixels):
            return change(detector.raw_predictions(pixels))

    changed = copy.copy(detector)
    changed.pipeline = EagerPipeline(Changed(), detector.input_size_hw, detector.config.max_candidates)
    return changed


@pytest.fixture(scope="module")
def dataset(reference, image_dir):
    """The reference's detections with a score of at least 0.5, as truth."""
    found = []
    options = dataclasses.replace(reference.config.default_options(), score_threshold=0.5)
    for image_id, path in enumerate(sorted(image_dir.glob("*.jpg"))):
        (detections,) = reference.detect([path.read_bytes()], [options])
        assert isinstance(detections, Detections)
        pairs = zip(detections.class_ids.tolist(), detections.boxes_xyxy.tolist(), strict=True)
        found.append(
            AnnotatedImage(image_id, path, tuple(AnnotatedObject(kind, tuple(box)) for kind, box in pairs))
        )
    return DetectionDataset("smears", dict(enumerate(NAMES)), tuple(found), 0)


def test_a_right_backend_passes_and_ap_is_compared(reference, images, dataset):
    same = with_backend(reference, lambda raw: raw)
    report = compare(reference, same, images, [1, 4], TOLERANCES["fp32"], dataset)
    report.require_passed()
    assert [each.batch_size for each in report.parities] == [1, 4]
    assert report.ap == report.reference_ap
    assert report.ap is not None
    assert report.ap > 0.8


def test_rounding_passes_as_float16_and_not_as_float32(reference, images):
    def rounded(raw):
        return RawPredictions(*(tuple(level.half().float() for level in side) for side in raw))

    for precision, passes in (("fp16", True), ("fp32", False)):
        candidate = with_backend(reference, rounded, precision)
        report = compare(reference, candidate, images, [1], TOLERANCES[precision])
        assert (report.failures() == []) is passes, report.lines()


@pytest.mark.parametrize("precision", ["fp16", "int8"])  # the tolerances of float32 are tighter
@pytest.mark.parametrize("name", WRONG_BACKENDS)
def test_a_silently_wrong_backend_is_refused(reference, images, dataset, name, precision):
    if name == "logits too low" and precision == "int8":
        pytest.skip("within the tolerance of int8")
    candidate = with_backend(reference, WRONG_BACKENDS[name], precision)
    truth = dataset if precision == "int8" else None  # check_parity requires one for int8
    report = compare(reference, candidate, images[:2], [1, 3], TOLERANCES[precision], truth)
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


def test_a_lost_class_is_noticed_even_if_no_image_shows_it(reference, images):
    report = compare(
        reference,
        with_backend(reference, WRONG_BACKENDS["a rare class lost"]),
        images,
        [1],
        dataclasses.replace(TOLERANCES["fp32"], score=1.0),
    )
    assert [failure for failure in report.failures() if "logit_noise" in failure]


def test_lower_ap_alone_is_refused(reference, images, dataset):
    loose = dataclasses.replace(TOLERANCES["int8"], score=1.0, box_px=1e3, logit_noise=1e3)
    candidate = with_backend(reference, WRONG_BACKENDS["a common class lost"], "int8")
    report = compare(reference, candidate, images, [1], loose, dataset)
    (failure,) = report.failures()
    assert failure.startswith("AP is")


def test_nan_exceeds_every_tolerance():
    nan = float("nan")
    report = ParityReport("fp32", TOLERANCES["fp32"], (Parity(1, nan, nan, nan),), (), 0.5, nan)
    assert len(report.failures()) == 4


def test_images_without_objects_are_refused(reference, monkeypatch, images):
    monkeypatch.setattr(parity, "SEEN_SCORE", 0.999)
    with pytest.raises(ScriptError, match="detects nothing in the 1 images"):
        compare(reference, reference, images[:1], [1], TOLERANCES["fp32"])


def test_an_image_that_cannot_be_read_is_named(reference, images):
    with pytest.raises(ScriptError, match="image 2"):
        compare(reference, reference, [images[0], b"x"], [1], TOLERANCES["fp32"])


def test_decoded_predictions_differ_by_the_worst_score_and_the_worst_likely_box():
    scores = torch.tensor([[[0.9, 0.1], [0.01, 0.02]]])  # B, A, K
    boxes_xyxy = torch.zeros(1, 2, 4)
    found = scores + torch.tensor([0.0, 0.05]), boxes_xyxy + torch.tensor([[2.0], [7.0]])
    agreement = parity.compare_decoded(found, (scores, boxes_xyxy))
    assert agreement.score_difference == pytest.approx(0.05)
    assert agreement.box_difference_px == 2.0
    nothing_likely = parity.compare_decoded(found, (scores * 0, boxes_xyxy))
    assert nothing_likely.box_difference_px == 0.0
