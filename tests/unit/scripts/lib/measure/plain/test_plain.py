"""The plain detector: what it finds, and the archive of it for TorchServe's own handler."""

import importlib
import io
import json
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from lib.accuracy.agreement import Rules, differences
from lib.archive.members import BatchingSetting, check_archive
from lib.archive.reader import load_detector
from lib.measure.plain.archive import open_plain_detector, plain_archive
from lib.packaging.class_names import DEMO_CLASS_NAMES
from lib.paths import DEMO_WEIGHTS, HANDLER_DIR

from damoyolo.model.checkpoint import load_checkpoint, save_packaged
from damoyolo.service import DetectionService


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Of the demo network."""
    folder = tmp_path_factory.mktemp("store")
    save_packaged(folder / "damoyolo.pth", load_checkpoint(DEMO_WEIGHTS))
    handler = {"variant": "S", "class_names": DEMO_CLASS_NAMES, "backend": "pytorch", "precision": "fp32"}
    settings = {**BatchingSetting(8, 2, 1).model_settings(), "handler": handler}
    model = {"modelName": "cells", "handler": "damoyolo_handler.py", "serializedFile": "damoyolo.pth"}
    with zipfile.ZipFile(folder / "cells.mar", "w") as made:
        made.write(folder / "damoyolo.pth", "damoyolo.pth")
        made.writestr("model-config.yaml", json.dumps(settings))
        made.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": model}))
        for path in HANDLER_DIR.rglob("*.py"):
            made.write(path, path.relative_to(HANDLER_DIR))
    return folder / "cells.mar"


@pytest.fixture(scope="module")
def image(project_dir):
    return (project_dir / "tests/data/smears/smear_3.jpg").read_bytes()


@pytest.fixture(scope="module")
def expected(archive, image):
    service = DetectionService(load_detector(archive, torch.device("cpu")))
    (answer,) = service.answer([{"body": image}], [{}])
    service.close()
    return json.loads(answer.body)["detections"]


def as_detections(found, class_names):
    columns = (found[key].tolist() for key in ("labels", "scores", "boxes"))
    return [
        {"label": class_names[label], "score": score, "bbox": box}
        for label, score, box in zip(*columns, strict=True)
    ]


def test_the_plain_detector_finds_what_the_project_finds(archive, image, expected, tmp_path):
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    detector, class_names = open_plain_detector(tmp_path, torch.device("cpu"))
    pixels = to_tensor(Image.open(io.BytesIO(image)))
    first, second = detector(torch.stack([pixels, pixels.flip(-1)]))
    # The same network in float32; rounding to whole numbers after the resizing is left out.
    rules = Rules(score=0.02, box_px=2.0)
    assert differences(as_detections(first, class_names), expected, rules) == []
    assert len(second["scores"]) > 0
    assert first["scores"].tolist() == sorted(first["scores"].tolist(), reverse=True)


@pytest.mark.filterwarnings("ignore:.*inline_inbuilt_nn_modules:FutureWarning")  # from TorchServe's import
def test_torchserves_own_handler_serves_the_archive_of_it(archive, image, expected, tmp_path, monkeypatch):
    made = plain_archive(archive, tmp_path, BatchingSetting(4, 2, 1))
    check_archive(made)
    with zipfile.ZipFile(made) as opened:
        opened.extractall(tmp_path / "unpacked")
        manifest = json.loads(opened.read("MAR-INF/MANIFEST.json"))
    monkeypatch.syspath_prepend(tmp_path / "unpacked")
    for name in ("captum", "captum.attr", "plain_model", "plain_detector"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    properties = {"model_dir": str(tmp_path / "unpacked"), "gpu_id": None}
    context = SimpleNamespace(model_yaml_config={}, system_properties=properties, manifest=manifest)
    handler = importlib.import_module("ts.torch_handler.object_detector").ObjectDetector()
    handler.initialize(context)
    found = handler.postprocess(handler.inference(handler.preprocess([{"body": image}, {"data": image}])))
    rows = [
        {"label": label, "score": row["score"], "bbox": box}
        for row in found[1]
        for label, box in row.items()
        if label != "score"
    ]
    above = [each for each in expected if each["score"] > 0.5]
    assert differences(rows, above, Rules(0.5, score=0.02, box_px=2.0)) == []
    assert found[0] == found[1]


def test_other_members_stay(archive, tmp_path):
    made = plain_archive(archive, tmp_path, BatchingSetting(4, 2, 3))
    with zipfile.ZipFile(made) as opened:
        settings = opened.read("model-config.yaml").decode()
        assert "damoyolo/boxes.py" in opened.namelist()
        assert "damoyolo.pth" not in opened.namelist()
    assert "minWorkers: 3" in settings
    assert "handler" not in settings
