"""The description of the served model."""

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from damoyolo.config import ServingConfig
from damoyolo.detector import Detector
from damoyolo.model_card import describe_model
from damoyolo.request import OPTION_NAMES
from damoyolo.response import CONTENT_TYPES
from doubles.tiny_archive import write_tiny_archive


@pytest.fixture
def archive(tmp_path):
    return write_tiny_archive(tmp_path / "archive")


def test_the_card_names_model_limits_options_and_versions(archive):
    detector = Detector.from_archive_dir(archive)
    card = json.loads(json.dumps(describe_model(detector, archive / "damoyolo.pth", "1.7")))
    detector.close()
    assert card["variant"] == "Ns"
    assert card["class_names"] == ["a", "b"]
    assert card["input_size_hw"] == [64, 64]
    assert (card["backend"], card["precision"], card["device"]) == ("pytorch", "fp32", "cpu")
    assert card["weights_sha256"] == hashlib.sha256((archive / "damoyolo.pth").read_bytes()).hexdigest()
    assert card["limits"]["max_image_pixels"] == ServingConfig().max_image_pixels
    limits = {name for name in vars(ServingConfig()) if name.startswith("max_")} - {"max_detections"}
    assert set(card["limits"]) == limits
    assert card["options"]["max_detections"] == {"default": 300, "minimum": 1, "maximum": 1000}
    assert card["options"]["format"]["accepted"] == list(CONTENT_TYPES)
    assert set(card["options"]) == set(OPTION_NAMES)
    assert card["versions"]["archive"] == "1.7"
    assert card["versions"]["torch"] == torch.__version__.split("+")[0]
    assert card["versions"]["pytorch"] == torch.__version__


def test_the_version_of_the_backends_library_is_named(archive, monkeypatch):
    detector = Detector.from_archive_dir(archive)
    monkeypatch.setattr(detector.pipeline.backend, "name", "openvino")
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(__version__="2026.4.1-abc"))
    card = describe_model(detector, archive / "damoyolo.pth", "1.0")
    detector.close()
    assert card["backend"] == "openvino"
    assert card["versions"]["openvino"] == "2026.4.1-abc"
