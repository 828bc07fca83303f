"""Archives for the table of backends: which file belongs to which weights, how TensorRT's are built."""

import subprocess
from types import SimpleNamespace

import onnx
import pytest
import torch

from lib.cli import ScriptError
from lib.measure.backend_archives import Model, build_row_archive, read_models
from lib.measure.backend_rows import rows_of
from lib.packaging.weights import folded_network

import build_tensorrt
from damoyolo.backends.onnx_metadata import metadata_of
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS

CLASS_NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An untrained Ns, in the format of trained weights."""
    path = tmp_path_factory.mktemp("weights") / "ns.pth"
    model = build_model(VARIANTS["Ns"], len(CLASS_NAMES), folded=False)
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def int8_metadata(weights):
    """The metadata of an INT8 file made from these weights."""
    model = folded_network(weights, None, len(CLASS_NAMES))
    return {**metadata_of(model, CLASS_NAMES).to_metadata(), "precision": "int8"}


def write_onnx(path, metadata):
    """An ONNX file with nothing but metadata."""
    content = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.helper.set_model_props(content, metadata)
    onnx.save(content, path)
    return path


def test_an_int8_file_is_assigned_to_the_weights_it_was_made_from(weights, int8_metadata, tmp_path):
    file = write_onnx(tmp_path / "int8.onnx", int8_metadata)
    assert read_models([str(weights)], CLASS_NAMES, [file]) == [Model(weights, "Ns", CLASS_NAMES, file)]
    with pytest.raises(ScriptError, match="both INT8 files of variant Ns"):
        read_models([str(weights)], CLASS_NAMES, [file, file])


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("weights_digest", "0", "not among --weights"),
        ("variant", "S", "variant S that are not among --weights"),
        ("precision", "fp32", "precision fp32; accepted are int8"),
    ],
)
def test_a_file_that_belongs_to_no_row_is_refused(weights, int8_metadata, tmp_path, entry, value, message):
    file = write_onnx(tmp_path / "other.onnx", {**int8_metadata, entry: value})
    with pytest.raises(ScriptError, match=message):
        read_models([str(weights)], CLASS_NAMES, [file])


def test_two_weights_of_one_variant_are_refused(weights):
    with pytest.raises(ScriptError, match="both of variant Ns"):
        read_models([str(weights), str(weights)], CLASS_NAMES, [])


def test_an_archive_has_the_settings_and_the_int8_file_of_its_row(tmp_path, monkeypatch):
    requests = {}

    def build(request):
        requests[request.output_dir.name] = request
        return SimpleNamespace(path=request.output_dir / "built.mar")

    monkeypatch.setattr("lib.measure.backend_archives.build_archive", build)
    model = Model(tmp_path / "w.pth", "Ns", CLASS_NAMES, tmp_path / "int8.onnx")
    for row in rows_of("cpu"):
        path = build_row_archive(model, row, tmp_path / row.name, 32, voc=None)
        assert path == tmp_path / row.name / "built.mar"
        request = requests[row.name]
        assert request.serving == {"backend": row.backend, "precision": row.precision}
        assert request.model_settings == {"batchSize": 32}
        assert request.onnx == (model.int8_file if row.quantised else None)


def test_a_tensorrt_archive_is_built_by_the_script_that_compares_engines(weights, tmp_path, monkeypatch):
    commands = []

    def refuse(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "the engine differs")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr("lib.onnx.export.export_onnx", lambda _model, path, **_: path.touch())
    model = Model(weights, "Ns", CLASS_NAMES, tmp_path / "int8.onnx")
    for row in rows_of("cuda"):
        if row.backend == "tensorrt":
            with pytest.raises(ScriptError, match="the engine differs"):
                build_row_archive(model, row, tmp_path / row.arithmetic, 8, voc=tmp_path / "data")
    parsed = [build_tensorrt._parser().parse_args(command[2:]) for command in commands]
    assert [each.precision for each in parsed] == ["fp32", "fp16", None]
    assert parsed[0].onnx.is_file()
    assert parsed[2].onnx == model.int8_file
    assert all(each.weights == str(weights) and each.voc == tmp_path / "data" for each in parsed)
