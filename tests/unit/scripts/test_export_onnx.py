"""ONNX files: each form gives what PyTorch gives, in any size, from equal inputs in equal bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from lib.onnx.check import ExportError, check_onnx, sample_batches
from lib.onnx.export import OPSET, OUTPUT_KINDS, OutputKind, export_onnx, read_onnx_metadata
from lib.packaging.weights import folded_network

import export_onnx as exporting
from damoyolo.backends.onnx_metadata import OUTPUT_NAMES, metadata_of, weights_digest
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo, build_model
from damoyolo.model.variants import VARIANTS
from damoyolo.preprocess import ImagePreprocessor
from export_onnx import main

DEMO_CLASSES = ("Platelets", "RBC", "WBC")


@pytest.fixture(scope="module")
def network(project_dir: Path) -> DamoYolo:
    """Variant S with the demo weights, folded."""
    return folded_network(project_dir / "model_store/weights/damoyolo_s_bccd.pth", None, 3)


@pytest.fixture(scope="module")
def smears(project_dir: Path) -> Tensor:
    """(3, 3, 256, 320) uint8, real images with cells."""
    paths = sorted((project_dir / "tests/data/smears").glob("*.jpg"))
    config = exporting.ServingConfig(class_names=DEMO_CLASSES)
    preprocessor = ImagePreprocessor(config, (256, 320), torch.device("cpu"))
    pixels = preprocessor.prepare([path.read_bytes() for path in paths]).pixels.clone()
    preprocessor.close()
    return pixels


@pytest.fixture(scope="module")
def files(network: DamoYolo, tmp_path_factory: pytest.TempPathFactory) -> dict[OutputKind, Path]:
    """The demo network in every form."""
    folder = tmp_path_factory.mktemp("onnx")
    for form in OUTPUT_KINDS:
        export_onnx(network, folder / f"{form}.onnx", form=form, class_names=DEMO_CLASSES)
    return {form: folder / f"{form}.onnx" for form in OUTPUT_KINDS}


@pytest.mark.parametrize("form", OUTPUT_KINDS)
def test_each_form_gives_what_pytorch_gives_for_batches_and_sizes_it_was_not_made_with(
    form: OutputKind, files: dict[OutputKind, Path], network: DamoYolo, smears: Tensor
) -> None:
    batches = [smears, smears[:1, :, :, :256], smears[1:, :, :224, :192]]
    agreement = check_onnx(files[form], network, batches)
    assert 0 <= agreement.score_difference <= 2e-5
    assert agreement.box_difference_px <= 1e-2


@pytest.mark.parametrize("form", OUTPUT_KINDS)
def test_a_file_of_other_weights_does_not_pass_the_check(
    form: OutputKind, files: dict[OutputKind, Path], smears: Tensor
) -> None:
    torch.manual_seed(1)
    other = build_model(VARIANTS["S"], 3, folded=True)
    with pytest.raises(ExportError, match=r"differs from PyTorch by .* accepted are 2e-05 and 0\.01 px"):
        check_onnx(files[form], other, [smears[:1]])


def test_the_sizes_are_open_and_the_types_as_stated(files: dict[OutputKind, Path]) -> None:
    written = onnx.load(files["raw"])
    (images,) = written.graph.input
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == [
        "batch",
        3,
        "height",
        "width",
    ]
    assert tuple(output.name for output in written.graph.output) == OUTPUT_NAMES
    assert all(o.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for o in written.graph.output)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", OPSET)]


def test_a_file_says_of_which_network_it_is_and_nothing_of_the_machine(
    files: dict[OutputKind, Path], network: DamoYolo, project_dir: Path
) -> None:
    for form, path in files.items():
        facts = read_onnx_metadata(path)
        assert facts == metadata_of(network, DEMO_CLASSES, form)
        assert (facts.variant, facts.num_classes, facts.reg_max, facts.precision) == ("S", 3, 16, "fp32")
        content = path.read_bytes()
        assert b".py" not in content
        assert str(project_dir).encode() not in content


def test_exporting_again_gives_equal_bytes_and_leaves_the_network_alone(
    files: dict[OutputKind, Path], network: DamoYolo, tmp_path: Path
) -> None:
    before = weights_digest(network)
    export_onnx(network, tmp_path / "again.onnx", class_names=DEMO_CLASSES)
    assert (tmp_path / "again.onnx").read_bytes() == files["raw"].read_bytes()
    assert weights_digest(network) == before


def test_the_digest_tells_weights_apart(network: DamoYolo) -> None:
    other = build_model(VARIANTS["S"], 3, folded=True)
    other.load_state_dict(network.state_dict())
    assert weights_digest(other) == weights_digest(network)
    with torch.no_grad():
        other.head.gfl_cls[0].bias[0] += 1
    assert weights_digest(other) != weights_digest(network)


def test_thresholds_and_limit_of_the_detections_form_are_inputs(
    files: dict[OutputKind, Path], smears: Tensor
) -> None:
    session = onnxruntime.InferenceSession(files["detections"], providers=["CPUExecutionProvider"])

    def count(score_threshold: float, limit: int) -> int:
        scores = session.run(
            ["scores"],
            {
                "images": smears.numpy(),
                "iou_threshold": np.array([0.45], np.float32),
                "score_threshold": np.array([score_threshold], np.float32),
                "max_boxes_a_class": np.array([limit], np.int64),
            },
        )[0]
        assert (scores > score_threshold).all()
        return len(scores)

    assert count(0.999, 100) == 0
    assert 0 < count(0.8, 100) < count(0.25, 100)
    assert count(0.25, 1) <= 3 * len(DEMO_CLASSES) < count(0.25, 100)


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_onnx_metadata(broken)
    broken.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="is no ONNX file"):
        read_onnx_metadata(broken)
    onnx.save(onnx.ModelProto(), broken)
    with pytest.raises(ConfigError, match="does not say what it holds"):
        read_onnx_metadata(broken)


def test_sample_batches_have_two_sizes(network: DamoYolo, project_dir: Path, tmp_path: Path) -> None:
    batches = sample_batches(network, project_dir / "tests/data/smears")
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 640, 640), (1, 3, 320, 640)]
    with pytest.raises(FileNotFoundError, match=r"no \*\.jpg"):
        sample_batches(network, tmp_path)


def test_the_command_writes_a_checked_file_or_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "made" / "damoyolo.onnx"
    assert main(["--output", str(output), "--weights", "nowhere.pth"]) == 1
    assert "nowhere.pth is neither a file" in capsys.readouterr().err
    monkeypatch.setattr(exporting, "export_onnx", lambda model, path, **_: path.write_bytes(b"nothing"))
    monkeypatch.setattr(exporting, "sample_batches", lambda *_: [])

    def refuse(*_: object) -> None:
        raise ExportError("differs")

    monkeypatch.setattr(exporting, "check_onnx", refuse)
    assert main(["--output", str(output)]) == 1
    assert "export_onnx: differs" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []
    agreement = exporting.Agreement(1e-6, 1e-4)
    monkeypatch.setattr(exporting, "check_onnx", lambda *_: agreement)
    assert main(["--output", str(output), "--form", "boxes"]) == 0
    assert "DAMO-YOLO-S, boxes" in capsys.readouterr().out
    assert output.read_bytes() == b"nothing"
