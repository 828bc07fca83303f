"""ONNX files: each kind of outputs agrees with PyTorch, in any size; metadata; refusals."""

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lib.cli import ScriptError
from lib.onnx.check import check_onnx, sample_batches
from lib.onnx.export import OPSET, export_onnx, read_onnx_metadata
from lib.packaging.class_names import DEMO_CLASS_NAMES

from damoyolo.backends.onnx_metadata import OUTPUT_NAMES, metadata_of, weights_digest
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS

KINDS = ["raw", pytest.param("boxes", marks=pytest.mark.slow), "detections"]


@pytest.fixture(scope="module")
def smears(smear_pixels):
    """(3, 3, 256, 320) uint8, images with cells."""
    return torch.from_numpy(smear_pixels)


@pytest.fixture(scope="module")
def file_of(demo_model, demo_onnx, tmp_path_factory):
    """The demo network with each kind of outputs."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def export(outputs):
        if outputs == "raw":
            return demo_onnx
        before = weights_digest(demo_model)
        export_onnx(demo_model, folder / outputs, outputs=outputs, class_names=DEMO_CLASS_NAMES)
        assert weights_digest(demo_model) == before
        return folder / outputs

    return export


@pytest.mark.parametrize("outputs", KINDS)
def test_a_file_agrees_with_pytorch_for_batches_and_sizes_it_was_not_made_with(
    outputs, file_of, demo_model, smears
):
    batches = [smears, smears[:1, :, :, :256], smears[1:, :, :224, :192]]
    agreement = check_onnx(file_of(outputs), demo_model, batches)
    assert 0 <= agreement.score_difference <= 2e-5
    assert agreement.box_difference_px <= 1e-2


@pytest.mark.parametrize("outputs", KINDS)
def test_a_file_of_other_weights_does_not_pass_the_check(outputs, file_of, smears):
    torch.manual_seed(1)
    other = build_model(VARIANTS["S"], 3, folded=True)
    with pytest.raises(ScriptError, match=r"differs from PyTorch by .* accepted are 2e-05 and 0\.01 px"):
        check_onnx(file_of(outputs), other, [smears[:1]])


def test_the_sizes_are_dynamic_and_the_types_as_documented(demo_network):
    (images,) = demo_network.graph.input
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    sides = [side.dim_param or side.dim_value for side in images.type.tensor_type.shape.dim]
    assert sides == ["batch", 3, "height", "width"]
    outputs = demo_network.graph.output
    assert tuple(output.name for output in outputs) == OUTPUT_NAMES
    assert all(output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for output in outputs)
    assert [(entry.domain, entry.version) for entry in demo_network.opset_import] == [("", OPSET)]


@pytest.mark.parametrize("outputs", KINDS)
def test_a_file_names_its_network_and_nothing_of_the_machine(outputs, file_of, demo_model, project_dir):
    metadata = read_onnx_metadata(file_of(outputs))
    assert metadata == metadata_of(demo_model, DEMO_CLASS_NAMES, outputs)
    assert (metadata.variant, metadata.num_classes, metadata.reg_max, metadata.form) == ("S", 3, 16, outputs)
    content = file_of(outputs).read_bytes()
    assert b".py" not in content
    assert str(project_dir).encode() not in content


def test_the_digest_tells_weights_apart(demo_model):
    other = build_model(VARIANTS["S"], 3, folded=True)
    other.load_state_dict(demo_model.state_dict())
    assert weights_digest(other) == weights_digest(demo_model)
    with torch.no_grad():
        other.head.gfl_cls[0].bias[0] += 1
    assert weights_digest(other) != weights_digest(demo_model)


def test_thresholds_and_limit_of_detections_are_inputs(file_of, smears):
    session = onnxruntime.InferenceSession(file_of("detections"), providers=["CPUExecutionProvider"])

    def count(score_threshold, limit):
        inputs = {
            "images": smears.numpy(),
            "iou_threshold": np.array([0.45], np.float32),
            "score_threshold": np.array([score_threshold], np.float32),
            "max_boxes_a_class": np.array([limit], np.int64),
        }
        (scores,) = session.run(["scores"], inputs)
        assert (scores > score_threshold).all()
        return len(scores)

    assert count(0.999, 100) == 0
    assert 0 < count(0.8, 100) < count(0.25, 100)
    assert count(0.25, 1) <= 3 * len(DEMO_CLASS_NAMES) < count(0.25, 100)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"nothing", "is no ONNX file"),
        (onnx.ModelProto().SerializeToString(), "does not say what it holds"),
    ],
)
def test_a_file_of_anything_else_is_refused(tmp_path, content, message):
    broken = tmp_path / "broken.onnx"
    if content is not None:
        broken.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_onnx_metadata(broken)


def test_sample_batches_have_two_sizes(demo_model, project_dir, tmp_path):
    batches = sample_batches(demo_model, project_dir / "tests/data/smears")
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 640, 640), (1, 3, 320, 640)]
    with pytest.raises(FileNotFoundError, match=r"no \*\.jpg"):
        sample_batches(demo_model, tmp_path)
