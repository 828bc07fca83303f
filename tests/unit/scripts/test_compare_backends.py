"""The accuracy gate: right backends pass, silently wrong ones do not, whatever is wrong with them."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from lib.accuracy import parity as accuracy_gate
from lib.accuracy.datasets import AnnotatedImage, AnnotatedObject, DetectionDataset
from lib.accuracy.parity import TOLERANCES, Parity, ParityError, ParityReport, compare

from compare_backends import main
from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE, Detector
from damoyolo.model.checkpoint import load_checkpoint, save_packaged
from damoyolo.pipeline import EagerPipeline
from damoyolo.structures import Detections, RawPredictions
from doubles.wrong_backends import WRONG_BACKENDS, Wrong

NAMES = ["Platelets", "RBC", "WBC"]
SETTINGS = {
    "class_names": NAMES,
    "backend": "pytorch",
    "precision": "fp32",
    "input_size_hw": [320, 320],
}


@pytest.fixture(scope="module")
def archive_dir(project_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    weights = load_checkpoint(project_dir / "model_store/weights/damoyolo_s_bccd.pth")
    save_packaged(folder / WEIGHTS_FILE, weights)
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump({"handler": SETTINGS}))
    return folder


@pytest.fixture(scope="module")
def reference(archive_dir: Path) -> Iterator[Detector]:
    detector = Detector.from_archive_dir(archive_dir)
    yield detector
    detector.close()


@pytest.fixture(scope="module")
def image_dir(project_dir: Path) -> Path:
    return project_dir / "tests/data/smears"


@pytest.fixture(scope="module")
def images(image_dir: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(image_dir.glob("*.jpg"))]


def with_backend(detector: Detector, change: Wrong, precision: str = "fp32") -> Detector:
    """The same detector with another backend; each image alone, as a real one would not notice either."""

    class Changed:
        name = "changed"
        device = detector.device

        def __init__(self) -> None:
            self.precision = precision

        def __call__(self, pixels: Tensor) -> RawPredictions:
            return change(detector.raw_predictions(pixels))

    changed = copy.copy(detector)
    changed.pipeline = EagerPipeline(Changed(), detector.input_size_hw, detector.config.max_candidates)
    return changed


@pytest.fixture(scope="module")
def dataset(reference: Detector, image_dir: Path) -> DetectionDataset:
    """What the reference finds at a score of 0.5, as truth."""
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


def test_a_right_backend_passes_and_ap_is_compared(
    reference: Detector, images: list[bytes], dataset: DetectionDataset
) -> None:
    same = with_backend(reference, lambda raw: raw)
    report = compare(reference, same, images, [1, 4], TOLERANCES["fp32"], dataset)
    report.require_passed()
    assert [each.batch_size for each in report.parities] == [1, 4]
    assert report.ap == report.reference_ap
    assert report.ap is not None
    assert report.ap > 0.8


def test_rounding_passes_as_float16_and_not_as_float32(reference: Detector, images: list[bytes]) -> None:
    def rounded(raw: RawPredictions) -> RawPredictions:
        return RawPredictions(*(tuple(level.half().float() for level in side) for side in raw))

    for precision, passes in (("fp16", True), ("fp32", False)):
        candidate = with_backend(reference, rounded, precision)
        report = compare(reference, candidate, images, [1], TOLERANCES[precision])
        assert (report.failures() == []) is passes, report.lines()


@pytest.mark.parametrize("precision", ["fp16", "int8"])  # float32 is held to less
@pytest.mark.parametrize("name", WRONG_BACKENDS)
def test_a_silently_wrong_backend_is_refused(
    reference: Detector, images: list[bytes], dataset: DetectionDataset, name: str, precision: str
) -> None:
    if name == "logits too low" and precision == "int8":
        pytest.skip("within what quantising may do")
    candidate = with_backend(reference, WRONG_BACKENDS[name], precision)
    truth = dataset if precision == "int8" else None  # check_parity insists on one for int8
    report = compare(reference, candidate, images[:2], [1, 3], TOLERANCES[precision], truth)
    with pytest.raises(ParityError, match="differs from PyTorch in float32"):
        report.require_passed()
    if name == "wrong in batches alone":
        assert all(failure.startswith("batch size 3") for failure in report.failures())


def test_no_two_images_of_a_batch_are_equal() -> None:
    pixels = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    for needed, count in ((1, 3), (5, 5), (32, 32), (100, 48)):
        varied = accuracy_gate.with_variations(pixels, needed)
        assert len(varied.flatten(1).unique(dim=0)) == len(varied) == count
        assert torch.equal(varied[:3], pixels)


def test_a_class_that_no_image_shows_is_missed_all_the_same(reference: Detector, images: list[bytes]) -> None:
    report = compare(
        reference,
        with_backend(reference, WRONG_BACKENDS["a rare class lost"]),
        images,
        [1],
        dataclasses.replace(TOLERANCES["fp32"], score=1.0),
    )
    assert [failure for failure in report.failures() if "logit_noise" in failure]


def test_lower_ap_alone_is_refused(
    reference: Detector, images: list[bytes], dataset: DetectionDataset
) -> None:
    loose = dataclasses.replace(TOLERANCES["int8"], score=1.0, box_px=1e3, logit_noise=1e3)
    candidate = with_backend(reference, WRONG_BACKENDS["a common class lost"], "int8")
    report = compare(reference, candidate, images, [1], loose, dataset)
    (failure,) = report.failures()
    assert failure.startswith("AP is")


def test_what_is_not_a_number_is_beyond_every_tolerance() -> None:
    nan = float("nan")
    report = ParityReport("fp32", TOLERANCES["fp32"], (Parity(1, nan, nan, nan),), (), 0.5, nan)
    assert len(report.failures()) == 4


def test_images_that_show_nothing_prove_nothing(
    reference: Detector, monkeypatch: pytest.MonkeyPatch, images: list[bytes]
) -> None:
    monkeypatch.setattr(accuracy_gate, "SEEN_SCORE", 0.999)
    with pytest.raises(ParityError, match="sees nothing in the 1 images"):
        compare(reference, reference, images[:1], [1], TOLERANCES["fp32"])


def test_an_image_that_cannot_be_read_is_named(reference: Detector, images: list[bytes]) -> None:
    with pytest.raises(ParityError, match="image 2"):
        compare(reference, reference, [images[0], b"x"], [1], TOLERANCES["fp32"])


@pytest.fixture
def parse() -> Callable[..., argparse.Namespace]:
    parser = argparse.ArgumentParser()
    accuracy_gate.add_parity_arguments(parser)
    return lambda *words: parser.parse_args(words)


def test_tolerances_are_those_of_the_precision_unless_given(
    parse: Callable[..., argparse.Namespace],
) -> None:
    changed = accuracy_gate.chosen_tolerances(parse("--box-px-tolerance", "3"), "fp16")
    assert changed == dataclasses.replace(TOLERANCES["fp16"], box_px=3.0)


def test_an_int8_backend_needs_a_data_set(
    archive_dir: Path,
    reference: Detector,
    monkeypatch: pytest.MonkeyPatch,
    parse: Callable[..., argparse.Namespace],
) -> None:
    pair = (reference, with_backend(reference, lambda raw: raw, "int8"))
    monkeypatch.setattr(accuracy_gate, "load_pair", lambda *_: pair)
    arguments = parse()
    evidence = accuracy_gate.read_evidence(arguments)
    with pytest.raises(ParityError, match="give a data set"):
        accuracy_gate.check_parity(archive_dir, torch.device("cpu"), [1], arguments, evidence)


def test_the_command_passes_an_archive_and_writes_its_figures(
    archive_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "new" / "report.json"
    command = ["--archive", str(archive_dir), "--device", "cpu", "--batch-sizes", "2"]
    assert main([*command, "--report", str(report)]) == 0
    assert "passed" in capsys.readouterr().out
    content = json.loads(report.read_text())
    assert content["failures"] == []
    assert content["parities"][0]["batch_size"] == 2
    assert main([*command, "--voc", str(tmp_path)]) == 1
    assert "no split" in capsys.readouterr().err
