"""The check on golden images: what is expected, what may differ, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from lib.accuracy.tolerances import TOLERANCES
from lib.cli import ScriptError
from lib.deploy.golden import (
    Expectation,
    Golden,
    GoldenImage,
    KnownObject,
    as_answer,
    check_served,
    compute_golden,
    count_found,
    differences,
    read_golden_images,
    tolerances_of,
)
from lib.packaging.class_names import DEMO_CLASS_NAMES
from lib.packaging.weights import load_source
from lib.paths import DEMO_WEIGHTS

from damoyolo.model.checkpoint import save_packaged
from damoyolo.structures import Detections
from doubles.images import encode
from doubles.stand_in_server import Reply, StandInServer, failed, found
from doubles.tiny_archive import write_tiny_archive

NAMES = ("a", "b")
# Of classes a, b, a; the last one is close to the threshold of 0.4.
FOUND = Detections(
    np.array([[10, 10, 50, 50], [100, 20, 140, 90], [5, 60, 25, 90]], np.float32),
    np.array([0.9, 0.8, 0.41], np.float32),
    np.array([0, 1, 0]),
    (100, 160),
)
EXPECTED = Expectation(GoldenImage("one.jpg", b"one", None), FOUND, input_scale=2.0)


def answer(*changes):
    """The expected answer with fields of detections changed: (index, field, value)."""
    detections = [{"class_id": NAMES.index(each["label"]), **each} for each in as_answer(FOUND, NAMES)]
    for index, name, value in changes:
        detections[index][name] = value
    return {"width": 160, "height": 100, "detections": detections}


def differ(given, precision="fp32"):
    return differences(given, EXPECTED, NAMES, TOLERANCES[precision])


def test_an_equal_answer_and_one_within_the_tolerances_are_accepted():
    assert differ(answer()) == []
    near = answer((0, "score", 0.9009), (1, "bbox", [100.2, 20.2, 139.8, 90.2]))
    assert differ(near) == []


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ((0, "score", 0.902), ["a 0.902 at [10.0, 10.0, 50.0, 50.0] was not expected", "a 0.900 at"]),
        ((1, "bbox", [100.3, 20, 140, 90]), ["b 0.800 at [100.3", "b 0.800 at [100.0"]),
        ((1, "label", "a"), ["a 0.800 at", "b 0.800 at"]),
    ],
)
def test_scores_boxes_and_classes_beyond_the_tolerances_are_named(change, problems):
    reported = differ(answer(change))
    assert len(reported) == len(problems)
    for text, start in zip(reported, problems, strict=True):
        assert text.startswith(start)
    assert differ(answer(change), "bf16") == [] or change[1] == "label"


def test_only_a_detection_near_the_threshold_may_be_missing_or_new():
    given = answer()
    del given["detections"][2]
    assert differ(given, "fp16") == []
    assert len(differ(given, "fp32")) == 1
    del given["detections"][1]
    assert [text.endswith("is missing") for text in differ(given, "fp16")] == [True]
    more = answer()
    more["detections"].append({"label": "b", "score": 0.405, "bbox": [0, 0, 9, 9]})
    assert differ(more, "fp16") == []
    more["detections"].append({"label": "b", "score": 0.9, "bbox": [0, 0, 9, 9]})
    assert [text.endswith("was not expected") for text in differ(more, "fp16")] == [True]


def test_another_image_size_is_a_difference():
    assert differ({**answer(), "width": 100}) == ["a size of 100x100 instead of 160x100"]


def test_tolerances_follow_precision_and_device():
    assert tolerances_of({"precision": "fp32", "device": "cpu"}) == TOLERANCES["fp32"]
    assert tolerances_of({}) == TOLERANCES["bf16"]
    on_gpu = tolerances_of({"precision": "fp16", "device": "cuda:0 (H100)"})
    assert on_gpu.score > TOLERANCES["fp16"].score
    assert on_gpu.box_px > TOLERANCES["fp16"].box_px


def test_each_known_object_needs_a_detection_of_its_own_class():
    boxes = {"a": (0, 0, 10, 10), "A": (1, 0, 11, 10), "b": (50, 50, 60, 60)}
    objects = [KnownObject(label.lower(), box) for label, box in boxes.items()]
    one = {"label": "a", "bbox": [0, 0, 10, 10]}
    assert count_found(objects, [one]) == 1
    assert count_found(objects, [one, {"label": "a", "bbox": [1, 0, 11, 10]}]) == 2
    assert count_found(objects, [{"label": "a", "bbox": [50, 50, 60, 60]}]) == 0


def test_images_are_read_with_the_objects_beside_them(tmp_path, project_dir):
    images = read_golden_images(project_dir / "tests/data/smears")
    assert [(each.name, len(each.objects)) for each in images] == [
        ("smear_3.jpg", 21),
        ("smear_4.jpg", 17),
        ("smear_7.jpg", 23),
    ]
    with pytest.raises(ScriptError, match="holds no"):
        read_golden_images(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    assert read_golden_images(tmp_path)[0].objects is None
    (tmp_path / "x.json").write_text('[["a", 1, 2, 3]]')
    with pytest.raises(ScriptError, match="is no list of"):
        read_golden_images(tmp_path)


def test_an_archive_of_other_classes_needs_other_golden_images(tmp_path, project_dir):
    archive = write_tiny_archive(tmp_path / "tiny")
    images = read_golden_images(project_dir / "tests/data/smears")
    with pytest.raises(ScriptError, match=r"show Platelets, RBC, WBC, .* classes are a, b; .*--golden"):
        compute_golden(archive, images)


def test_weights_that_are_not_trained_are_refused(tmp_path, project_dir):
    archive = write_tiny_archive(tmp_path / "tiny")
    settings = json.loads((archive / "model-config.yaml").read_text())
    settings["handler"]["class_names"] = ["RBC", "WBC"]
    (archive / "model-config.yaml").write_text(json.dumps(settings))
    image = read_golden_images(project_dir / "tests/data/smears")[0]
    cell = dataclasses.replace(image, objects=(KnownObject("RBC", (262, 140, 361, 233)),))
    with pytest.raises(ScriptError, match="known objects"):
        compute_golden(archive, [cell])


def write_demo_archive(folder, shift):
    """The demo weights for small images, unpacked; the classes' channels moved on by `shift`."""
    checkpoint = load_source(DEMO_WEIGHTS, None, len(DEMO_CLASS_NAMES), False)
    state = {
        key: tensor.roll(shift, 0) if ".gfl_cls." in key and len(tensor) == 3 else tensor
        for key, tensor in checkpoint.state_dict.items()
    }
    assert any(not torch.equal(state[key], checkpoint.state_dict[key]) for key in state) == bool(shift)
    folder.mkdir()
    save_packaged(folder / "damoyolo.pth", dataclasses.replace(checkpoint, state_dict=state))
    settings = {"variant": "S", "class_names": list(DEMO_CLASS_NAMES), "input_size_hw": [256, 320]}
    (folder / "model-config.yaml").write_text(json.dumps({"handler": settings}))
    return folder


def test_the_right_weights_are_accepted_and_those_with_the_classes_in_another_order_refused(
    tmp_path, project_dir
):
    images = read_golden_images(project_dir / "tests/data/smears")
    golden = compute_golden(write_demo_archive(tmp_path / "right", 0), images)
    assert golden.class_names == DEMO_CLASS_NAMES
    assert [each.input_scale for each in golden.expectations] == [2.0] * 3  # 640x480 to 320x256
    blank = GoldenImage("blank.png", encode(np.zeros((48, 64, 3), np.uint8)), None)
    with pytest.raises(ScriptError, match=r"detects nothing above 0\.4 in the 1 golden images; --golden"):
        compute_golden(tmp_path / "right", [blank])
    with pytest.raises(ScriptError, match=r"finds \d of 61 known objects"):
        compute_golden(write_demo_archive(tmp_path / "wrong", 1), images)


@pytest.fixture
def golden():
    return Golden(NAMES, 300, (EXPECTED,))


def served(reply, golden, precision="fp32"):
    with StandInServer(lambda _: reply) as server:
        sent = check_served(server.url + "/2.0", golden, TOLERANCES[precision], 4, "key", 10.0)
        return sent, server.asked


def test_every_answer_of_a_served_version_is_compared(golden):
    reply = found(*answer()["detections"], width=160, height=100)
    sent, asked = served(reply, golden)
    assert sent == len(asked) == 12
    headers = {name.lower(): value for name, value in asked[0].headers.items()}
    assert headers["authorization"] == "Bearer key"
    assert headers["x-detect-score-threshold"] == "0.4"
    assert asked[0].path == "/predictions/damoyolo/2.0"


def test_a_wrong_answer_an_error_and_no_answer_are_refused(golden):
    wrong = found(*answer((0, "score", 0.7))["detections"], width=160, height=100)
    with pytest.raises(ScriptError, match=r"answers one\.jpg not as its archive does in float32: a 0\.700"):
        served(wrong, golden)
    with pytest.raises(ScriptError, match=r"one\.jpg: 507 OutOfMemory: full"):
        served(failed(507, "OutOfMemory", "full"), golden)
    with pytest.raises(ScriptError, match="no answer from"):
        served(Reply(drop=True), golden)
