"""The evaluation command, with a stand-in server and with a stand-in detector."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from lib.accuracy.predictors import EVALUATION_OPTIONS

import evaluate
from damoyolo.config import ServingConfig
from damoyolo.structures import Detections
from doubles.interrupt import interrupt_while_waiting
from doubles.stand_in_server import StandInServer, failed, found

NAMES = ("Platelets", "RBC", "WBC")
# The images' bytes are their names; what is in each: class and box_xyxy.
TRUTH = {
    "a.jpg": [("RBC", (10, 10, 60, 70)), ("WBC", (100, 100, 250, 240))],
    "b.jpg": [("RBC", (20, 30, 80, 90)), ("Platelets", (5, 5, 6, 30))],
    "c.jpg": [],
}


@pytest.fixture
def data(tmp_path):
    """Arguments that name a data set of TRUTH in COCO format; one of its objects is too small."""
    annotations = []
    for image_id, (name, objects) in enumerate(TRUTH.items(), start=1):
        (tmp_path / name).write_bytes(name.encode())
        for label, (x1, y1, x2, y2) in objects:
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": NAMES.index(label),
                    "bbox": box,
                }
            )
    content = {
        "images": [{"id": image_id, "file_name": name} for image_id, name in enumerate(TRUTH, start=1)],
        "categories": [{"id": index, "name": name} for index, name in enumerate(NAMES)],
        "annotations": annotations,
    }
    (tmp_path / "cells.json").write_text(json.dumps(content))
    return ["--coco", str(tmp_path / "cells.json"), "--images", str(tmp_path)]


def perfect(asked):
    """All objects in the image, with labels that differ from the data set's in case."""
    objects = TRUTH[asked.body.decode()]
    return found(
        *({"class_id": 0, "label": label.lower(), "score": 0.9, "bbox": list(box)} for label, box in objects)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib and its imports
def test_a_perfect_server_is_reported_with_all_settings_and_versions(data, tmp_path, capsys):
    rows, plot = tmp_path / "new" / "rows.jsonl", tmp_path / "other" / "plot.png"
    with StandInServer(perfect) as server:
        command = [
            *data,
            "--url",
            server.base_url,
            "--jsonl",
            str(rows),
            "--plot",
            str(plot),
            "--note",
            "fp32",
        ]
        assert evaluate.main(command) == 0
        assert evaluate.main([*command, "--progress"]) == 0
    out, err = capsys.readouterr()
    assert "3 images, 3 objects of 3 classes; 1 objects under 2 px dropped" in out
    assert "images per second" in out
    assert "3/3" in err
    first, second = (json.loads(line) for line in rows.read_text().splitlines())
    assert first.keys() == second.keys()
    assert (first["ap"], first["ap50"], first["ap75"]) == pytest.approx((1, 1, 1))
    assert set(first["per_class"]) == {"RBC", "WBC"}
    expected = {
        "data_set": "cells",
        "images": 3,
        "objects": 3,
        "dropped_objects": 1,
        "predictions": 4,
        "score_threshold": 0.05,
        "iou_threshold": 0.7,
        "max_detections": 500,
        "in_flight": 8,
        "note": "fp32",
        "url": server.base_url,
    }
    assert {name: first[name] for name in expected} == expected
    assert {"python", "torch", "torchvision", "pycocotools"} <= first["versions"].keys()
    assert first["images_per_s"] > 0
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_results_load_with_pycocotools_and_have_the_ids_of_the_data_set(data, tmp_path):
    results = tmp_path / "new" / "results.json"
    with StandInServer(perfect) as server:
        # The images are beside the annotations file.
        assert evaluate.main([*data[:2], "--url", server.base_url, "--results", str(results)]) == 0
    loaded = COCO(data[1]).loadRes(str(results))
    assert [(each["image_id"], each["category_id"]) for each in loaded.anns.values()] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 0),
    ]
    assert not results.with_name("results.images.json").exists()


def test_results_of_a_data_set_without_ids_come_with_a_list_of_its_images(tmp_path):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    box = "<xmin>10</xmin><ymin>10</ymin><xmax>60</xmax><ymax>70</ymax>"
    objects = f"<object><name>RBC</name><bndbox>{box}</bndbox></object>"
    (tmp_path / "Annotations/a.xml").write_text(f"<annotation>{objects}</annotation>")
    (tmp_path / "JPEGImages/a.jpg").write_bytes(b"a.jpg")
    (tmp_path / "ImageSets/Main/test.txt").write_text("a\n")
    results = tmp_path / "results.json"

    def one_cell(_asked):
        return found({"class_id": 0, "label": "RBC", "score": 0.9, "bbox": [10, 10, 60, 70]})

    with StandInServer(one_cell) as server:
        command = ["--voc", str(tmp_path), "--url", server.base_url, "--results", str(results)]
        assert evaluate.main(command) == 0
    index = COCO(str(tmp_path / "results.images.json"))
    assert index.imgs[1]["file_name"] == "a.jpg"
    assert index.loadRes(str(results)).anns[1]["category_id"] == 1


@pytest.mark.slow
def test_the_sample_smears_are_a_data_set_that_the_demo_network_knows(project_dir, demo_archive_dir, capsys):
    annotations = project_dir / "tests/data/smears/annotations.json"
    assert evaluate.main(["--coco", str(annotations), "--archive", str(demo_archive_dir)]) == 0
    out = capsys.readouterr().out
    assert "3 images, 61 objects" in out
    for label in ("RBC", "WBC"):  # the platelets are drawn smaller than those it has learned from
        assert float(re.search(rf"{label} +[\d.]+ +([\d.]+)", out)[1]) > 0.9  # AP50


def test_the_default_options_are_those_of_all_accuracies_and_reach_the_server(data):
    with StandInServer(perfect) as server:
        evaluate.main([*data, "--url", server.base_url, "--classes", "RBC,WBC,Platelets"])
    for asked in server.asked:
        assert asked.headers["X-Detect-Score-Threshold"] == str(EVALUATION_OPTIONS.score_threshold)
        assert asked.headers["X-Detect-Iou-Threshold"] == str(EVALUATION_OPTIONS.iou_threshold)
        assert asked.headers["X-Detect-Max-Detections"] == str(EVALUATION_OPTIONS.max_detections)
        assert asked.headers["X-Detect-Classes"] == "RBC,WBC,Platelets"


def test_a_failed_image_means_no_figures(data, tmp_path, capsys):
    def refuse_b(asked):
        return failed(422, "CorruptImage", "cut off") if asked.body == b"b.jpg" else perfect(asked)

    with StandInServer(refuse_b) as server:
        assert evaluate.main([*data, "--url", server.base_url, "--jsonl", str(tmp_path / "rows")]) == 1
    out, err = capsys.readouterr()
    assert "b.jpg: 422 CorruptImage: cut off" in err
    assert "AP50" not in out
    assert not (tmp_path / "rows").exists()


def test_a_worker_that_dies_costs_no_image(data, capsys):
    died = iter([False, True, True])  # the first request is the warm-up

    def dying(asked):
        if next(died, False):
            return failed(507, "InternalServerException", "Worker died.")
        return perfect(asked)

    with StandInServer(dying) as server:
        assert evaluate.main([*data, "--url", server.base_url]) == 0
    out, err = capsys.readouterr()
    assert "4 detections in" in out
    assert "2 requests were sent again" in err


def test_an_interrupt_ends_the_command_at_once_in_one_line(data, project_dir):
    interrupted = interrupt_while_waiting(["scripts/evaluate.py", *data], project_dir)
    assert interrupted == (130, "evaluate: interrupted\n")


def test_a_server_that_detects_nothing_is_reported_in_words(data, capsys):
    with StandInServer(lambda asked: found()) as server:
        assert evaluate.main([*data, "--url", server.base_url]) == 1
    assert "nothing was detected in the 3 images" in capsys.readouterr().err


def test_a_data_set_without_images_is_reported_in_words(tmp_path, capsys):
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("\n")
    assert evaluate.main(["--voc", str(tmp_path)]) == 1
    assert "has no images" in capsys.readouterr().err


def test_without_a_server_the_message_says_what_to_start(data, capsys):
    with StandInServer(perfect) as server:
        url = server.base_url
    assert evaluate.main([*data, "--url", url]) == 1
    assert "scripts/serve.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--images", "dir"],
        ["--images", "dir", "--voc", "dir"],
        ["--voc", "dir", "--coco", "a.json", "--images", "dir"],
        ["--voc", "dir", "--precision", "fp16"],
        ["--voc", "dir", "--variant", "S"],
        ["--voc", "dir", "--archive", "a.mar", "--weights", "a.pth"],
        ["--voc", "dir", "--archive", "a.mar", "--in-flight", "4"],
        ["--voc", "dir", "--archive", "a.mar", "--ca-file", "ca.pem"],
        ["--voc", "dir", "--score-threshold", "2"],
        ["--coco", "a.json", "--pictures", "dir"],
    ],
)
def test_contradictory_arguments_are_a_usage_error(arguments):
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main(arguments)
    assert exit_info.value.code == 2


class StandInDetector:
    """Detects what TRUTH says; has its own order of the classes."""

    class_names = ("WBC", "RBC", "Platelets")

    def __init__(self):
        self.config = ServingConfig(class_names=self.class_names)
        self.pipeline = self
        self.name = "pytorch"
        self.precision = "fp32"
        self.batches = []

    def detect(self, images, options):
        self.batches.append((list(images), list(options)))
        return [self._detections(TRUTH[image.decode()]) for image in images]

    def _detections(self, objects):
        return Detections(
            np.array([box for _, box in objects], np.float32).reshape(-1, 4),
            np.full(len(objects), 0.9, np.float32),
            np.array([self.class_names.index(label) for label, _ in objects], np.int64),
            (480, 640),
        )


@pytest.fixture
def detector(monkeypatch):
    """The detector that every archive contains."""
    stand_in = StandInDetector()
    monkeypatch.setattr("lib.archive.reader.load_detector", lambda *_, **__: stand_in)
    return stand_in


IN_PROCESS = ["--archive", "damoyolo.mar", "--device", "cpu"]


def test_an_archive_is_evaluated_in_batches(data, detector, tmp_path):
    rows = tmp_path / "rows"
    assert evaluate.main([*data, *IN_PROCESS, "--batch-size", "2", "--jsonl", str(rows)]) == 0
    row = json.loads(rows.read_text())
    assert (row["ap"], row["backend"], row["precision"]) == (pytest.approx(1), "pytorch", "fp32")
    assert row["batch_size"] == 2
    assert row["device"].startswith("cpu")
    warm_up, *batches = [images for images, _ in detector.batches]
    assert warm_up == [b"a.jpg"]
    assert batches == [[b"a.jpg", b"b.jpg"], [b"c.jpg"]]
    assert {option for _, options in detector.batches for option in options} == {EVALUATION_OPTIONS}


def test_classes_become_the_ids_of_the_detector(data, detector):
    assert evaluate.main([*data, *IN_PROCESS, "--classes", "platelets,WBC"]) == 0
    assert detector.batches[0][1][0].class_ids == (2, 0)


def test_a_detector_without_a_class_of_the_data_set_is_refused_before_work_begins(data, detector, capsys):
    detector.config = ServingConfig(class_names=("person", "RBC"))
    assert evaluate.main([*data, *IN_PROCESS]) == 1
    assert "no class is called Platelets, WBC; there are person, RBC" in capsys.readouterr().err
    assert detector.batches == []


@pytest.mark.parametrize("content", [None, b"no zip"])
def test_a_file_that_is_no_archive_is_named(data, tmp_path, capsys, content):
    path = tmp_path / "broken.mar"
    if content is not None:
        path.write_bytes(content)
    assert evaluate.main([*data, "--archive", str(path), "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert "broken.mar" in err
    assert "build_archive.py" in err
