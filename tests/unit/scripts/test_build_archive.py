"""Archives: equal from equal inputs, verified before they take their place, refused with a reason."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from lib.onnx.export import export_onnx
from lib.packaging.builder import ArchiveError, ArchiveReport, ArchiveRequest, content_digest, verify_archive
from lib.packaging.class_names import DEMO_CLASS_NAMES, read_class_names
from lib.packaging.weights import folded_network

import build_archive
from build_archive import main
from damoyolo.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ArchiveReport:
    settings = {"batchSize": 4, "maxBatchDelay": 7, "minWorkers": 2, "maxWorkers": 2}
    return build_archive.build_archive(
        ArchiveRequest(
            output_dir=tmp_path_factory.mktemp("store"),
            model_settings=settings,
            serving={"score_threshold": 0.4, "precision": "fp32"},
        )
    )


def test_the_archive_holds_every_module_the_settings_and_the_weights(
    report: ArchiveReport, project_dir: Path
) -> None:
    with zipfile.ZipFile(report.path) as opened:
        names = set(opened.namelist())
        settings = yaml.safe_load(opened.read("model-config.yaml"))
        manifest = json.loads(opened.read("MAR-INF/MANIFEST.json"))
    modules = {
        str(path.relative_to(project_dir / "handler")) for path in (project_dir / "handler").rglob("*.py")
    }
    assert modules <= names
    assert "damoyolo.onnx" not in names  # only where it was asked for
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    assert settings["batchSize"] == 4
    assert settings["maxBatchDelay"] == 7
    assert settings["handler"]["score_threshold"] == 0.4
    assert settings["handler"]["class_names"] == list(DEMO_CLASS_NAMES)
    assert manifest["model"]["handler"] == "damoyolo_handler.py"
    assert report.files == len(names)
    assert (report.variant, report.num_classes) == ("S", 3)


def test_equal_inputs_give_an_equal_digest_and_others_another(
    report: ArchiveReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_archive, "verify_archive", lambda _: [])  # done for the first one
    settings = {"batchSize": 4, "maxBatchDelay": 7, "minWorkers": 2, "maxWorkers": 2}
    serving = {"score_threshold": 0.4, "precision": "fp32"}
    again = build_archive.build_archive(
        ArchiveRequest(output_dir=tmp_path / "a", model_settings=settings, serving=serving)
    )
    assert again.digest == report.digest
    other = build_archive.build_archive(
        ArchiveRequest(
            output_dir=tmp_path / "b", model_settings={**settings, "batchSize": 5}, serving=serving
        )
    )
    assert other.digest != report.digest


@pytest.fixture(scope="module")
def demo_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo weights as ONNX."""
    path = tmp_path_factory.mktemp("onnx") / "some-name.onnx"
    export_onnx(folded_network(build_archive.DEMO_WEIGHTS, None, 3), path, class_names=DEMO_CLASS_NAMES)
    return path


def test_an_onnx_file_of_the_weights_is_packed_and_runs(demo_onnx: Path, tmp_path: Path) -> None:
    report = build_archive.build_archive(
        ArchiveRequest(output_dir=tmp_path, onnx=demo_onnx, serving={"backend": "onnxruntime"})
    )
    with zipfile.ZipFile(report.path) as opened:
        assert opened.read("damoyolo.onnx") == demo_onnx.read_bytes()
        settings = yaml.safe_load(opened.read("model-config.yaml"))
    assert settings["handler"]["backend"] == "onnxruntime"


def test_a_backend_that_needs_the_file_gets_one_that_is_made_from_the_weights(
    demo_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_archive, "verify_archive", lambda _: [])
    report = build_archive.build_archive(
        ArchiveRequest(output_dir=tmp_path, serving={"backend": "onnxruntime"})
    )
    with zipfile.ZipFile(report.path) as opened:
        assert opened.read("damoyolo.onnx") == demo_onnx.read_bytes()


def test_an_onnx_file_of_other_weights_or_classes_is_refused(
    demo_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ConfigError, match=r"class_names Platelets, RBC, WBC, settings and weights .* a, b, c"
    ):
        build_archive.build_archive(
            ArchiveRequest(output_dir=tmp_path, onnx=demo_onnx, class_names=("a", "b", "c"))
        )
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    arguments = ["--onnx", str(tmp_path / "broken.onnx"), "--output-dir", str(tmp_path)]
    assert main(arguments) == 1
    assert "is no ONNX file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken.onnx"]


def test_without_the_packages_of_onnx_the_way_out_is_named(
    demo_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "export_onnx", None)
    with pytest.raises(ArchiveError, match="pip install onnx onnxscript onnxruntime"):
        build_archive.build_archive(ArchiveRequest(output_dir=tmp_path, onnx=demo_onnx))


def rebuilt(source: Path, target: Path, change: dict[str, bytes | None]) -> Path:
    """A copy of an archive with files replaced, or left out where None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change.get(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def test_the_digest_does_not_depend_on_when_it_was_packed(report: ArchiveReport, tmp_path: Path) -> None:
    with zipfile.ZipFile(report.path) as opened:
        manifest = json.loads(opened.read("MAR-INF/MANIFEST.json"))
    manifest["createdOn"] = "01/01/2000 00:00:00"
    later = rebuilt(report.path, tmp_path / "x.mar", {"MAR-INF/MANIFEST.json": json.dumps(manifest).encode()})
    assert content_digest(later) == report.digest


def test_an_archive_that_lacks_a_module_is_refused(report: ArchiveReport, tmp_path: Path) -> None:
    broken = rebuilt(report.path, tmp_path / "x.mar", {"damoyolo/boxes.py": None})
    with pytest.raises(ArchiveError, match=r"lacks damoyolo/boxes\.py"):
        verify_archive(broken)


def test_an_archive_that_cannot_detect_is_refused_with_its_traceback(
    report: ArchiveReport, tmp_path: Path
) -> None:
    broken = rebuilt(report.path, tmp_path / "x.mar", {"damoyolo.pth": b"nothing"})
    with pytest.raises(ArchiveError, match=r"(?s)Traceback.*CheckpointError"):
        verify_archive(broken)


def test_settings_that_the_worker_would_refuse_are_refused_before_packing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="score_threshold"):
        build_archive.build_archive(ArchiveRequest(output_dir=tmp_path, serving={"score_threshold": 7.0}))
    with pytest.raises(CheckpointError, match="fits variant S"):
        build_archive.build_archive(ArchiveRequest(output_dir=tmp_path, variant="T"))
    with pytest.raises(CheckpointError, match="class names"):
        build_archive.build_archive(ArchiveRequest(output_dir=tmp_path, class_names=("a", "b", "c", "d")))
    assert list(tmp_path.iterdir()) == []


def test_an_archive_for_tensorrt_is_not_built_without_a_backend(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"build_tensorrt\.py"):
        build_archive.build_archive(ArchiveRequest(output_dir=tmp_path, serving={"backend": "tensorrt"}))
    assert list(tmp_path.iterdir()) == []


def test_class_names_are_read_from_text_and_json(tmp_path: Path) -> None:
    text, listed, indexed = tmp_path / "a.txt", tmp_path / "a.json", tmp_path / "b.json"
    text.write_text("one\n\n two \n")
    listed.write_text('["one", "two"]')
    indexed.write_text('{"0": "one", "1": "two"}')
    assert read_class_names(text) == read_class_names(listed) == read_class_names(indexed) == ("one", "two")


def test_the_command_says_what_is_wrong_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", "nowhere.pth", "--output-dir", str(tmp_path)]) == 1
    assert "nowhere.pth is neither a file" in capsys.readouterr().err
