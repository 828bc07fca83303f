"""Archives: equal from equal inputs, verified before they take their place, refused with a reason."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from lib.archive.members import MANIFEST_FILE, copy_archive
from lib.cli import ScriptError
from lib.packaging.builder import ArchiveRequest, build_archive, content_digest
from lib.packaging.class_names import DEMO_CLASS_NAMES

from damoyolo.errors import CheckpointError, ConfigError

REQUEST = {
    "model_settings": {"batchSize": 4, "maxBatchDelay": 7, "minWorkers": 2, "maxWorkers": 2},
    "serving": {"score_threshold": 0.4, "precision": "fp32"},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return build_archive(ArchiveRequest(output_dir=tmp_path_factory.mktemp("store"), **REQUEST))


def test_the_archive_holds_every_module_the_settings_and_the_weights(report, project_dir):
    with zipfile.ZipFile(report.path) as opened:
        names = set(opened.namelist())
        sums = opened.read("SHA256SUMS").decode()
        weights = opened.read("damoyolo.pth")
        settings = yaml.safe_load(opened.read("model-config.yaml"))
        manifest = json.loads(opened.read(MANIFEST_FILE))
    handler = project_dir / "handler"
    assert {str(path.relative_to(handler)) for path in handler.rglob("*.py")} <= names
    assert "damoyolo.onnx" not in names  # only on request
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    assert settings["batchSize"] == 4
    assert settings["maxBatchDelay"] == 7
    assert settings["handler"]["score_threshold"] == 0.4
    assert settings["handler"]["class_names"] == list(DEMO_CLASS_NAMES)
    assert manifest["model"]["handler"] == "damoyolo_handler.py"
    assert sums == f"{hashlib.sha256(weights).hexdigest()}  damoyolo.pth\n"
    assert report.files == len(names)
    assert (report.variant, report.num_classes) == ("S", 3)


@pytest.mark.usefixtures("unverified")
def test_equal_inputs_give_an_equal_digest_and_others_another(report, tmp_path):
    assert build_archive(ArchiveRequest(output_dir=tmp_path / "a", **REQUEST)).digest == report.digest
    changed = {**REQUEST, "serving": {"score_threshold": 0.5, "precision": "fp32"}}
    assert build_archive(ArchiveRequest(output_dir=tmp_path / "b", **changed)).digest != report.digest


def test_the_digest_does_not_depend_on_when_it_was_packed(report, tmp_path):
    with zipfile.ZipFile(report.path) as opened:
        manifest = json.loads(opened.read(MANIFEST_FILE))
    manifest["createdOn"] = "01/01/2000 00:00:00"
    later = copy_archive(report.path, tmp_path / "x.mar", {MANIFEST_FILE: json.dumps(manifest).encode()})
    assert content_digest(later) == report.digest


@pytest.mark.slow
def test_an_onnx_file_of_the_weights_is_packed_and_runs(demo_onnx, tmp_path):
    report = build_archive(
        ArchiveRequest(output_dir=tmp_path, onnx=demo_onnx, serving={"backend": "onnxruntime"})
    )
    with zipfile.ZipFile(report.path) as opened:
        assert opened.read("damoyolo.onnx") == demo_onnx.read_bytes()
        settings = yaml.safe_load(opened.read("model-config.yaml"))
    assert settings["handler"]["backend"] == "onnxruntime"


@pytest.mark.slow
@pytest.mark.usefixtures("unverified")
def test_a_backend_that_needs_an_onnx_file_gets_a_checked_export_of_the_weights(
    demo_onnx, tmp_path, monkeypatch
):
    checked = []
    monkeypatch.setattr("lib.onnx.check.check_onnx", lambda path, *_: checked.append(path))
    report = build_archive(ArchiveRequest(output_dir=tmp_path, serving={"backend": "onnxruntime"}))
    assert [path.name for path in checked] == ["damoyolo.onnx"]
    with zipfile.ZipFile(report.path) as opened:
        assert opened.read("damoyolo.onnx") == demo_onnx.read_bytes()  # an export is reproducible


def test_an_onnx_file_of_other_classes_or_of_anything_else_is_refused(demo_onnx, tmp_path):
    with pytest.raises(
        ConfigError, match=r"class_names Platelets, RBC, WBC, settings and weights .* a, b, c"
    ):
        build_archive(ArchiveRequest(output_dir=tmp_path, onnx=demo_onnx, class_names=("a", "b", "c")))
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="is no ONNX file"):
        build_archive(ArchiveRequest(output_dir=tmp_path, onnx=tmp_path / "broken.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.onnx"]


def test_without_the_packages_of_onnx_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lib.onnx.export", None)
    with pytest.raises(ScriptError, match="pip install onnx onnxscript onnxruntime"):
        build_archive(ArchiveRequest(output_dir=tmp_path, onnx=Path("any.onnx")))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"serving": {"score_threshold": 7.0}}, ConfigError, "score_threshold"),
        ({"serving": {"backend": "tensorrt"}}, ScriptError, r"build_tensorrt\.py"),
        ({"variant": "T"}, CheckpointError, "fits variant S"),
        ({"class_names": ("a", "b", "c", "d")}, CheckpointError, "3 classes, but 4 class names"),
        ({"class_names": ("a", "b")}, CheckpointError, "3 classes, but 2 class names.*--unused-class"),
        ({"class_names": ()}, ScriptError, "no class names"),
        ({"class_names": ("a",)}, CheckpointError, "3 classes, but 1 class names"),
        ({"unused_class": True}, CheckpointError, "3 classes, but 3 class names .*each class but the last"),
    ],
)
def test_what_the_worker_would_refuse_is_refused_before_packing(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        build_archive(ArchiveRequest(output_dir=tmp_path, **change))
    assert list(tmp_path.iterdir()) == []
