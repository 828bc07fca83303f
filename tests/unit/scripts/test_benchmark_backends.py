"""The table of backends: what is built, measured, printed and written."""

import json

import onnx
import pytest
import torch

from lib.cli import ScriptError
from lib.measure.backend_archives import Model
from lib.measure.backend_rows import Machine, rows_of
from lib.onnx.export import export_onnx
from lib.packaging.weights import folded_network
from lib.paths import DEMO_WEIGHTS

import benchmark_backends
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS

CPU_ONLY = Machine(
    has_gpu=False,
    libraries=frozenset({"torch", "onnxruntime", "onnx", "onnxscript"}),
    onnxruntime_has_cuda=False,
    cpu_computes_bf16=False,
)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(Machine, "here", classmethod(lambda _: CPU_ONLY))


@pytest.fixture
def built(monkeypatch):
    """The rows that archives are built for, without building and measuring; ONNX Runtime's are refused."""
    built = []

    def build(model, row, folder, *_):
        built.append(row.name)
        if row.backend == "onnxruntime":
            raise ScriptError("too large")
        folder.mkdir()
        return folder  # a folder counts as unpacked

    def measure(folders, *_):
        return {name: {"ap": 0.5, "detector_ms": 12.3, "best_batch_size": 4} for name in folders}

    model = Model(DEMO_WEIGHTS, "S", ("a",))
    monkeypatch.setattr("lib.measure.backend_archives.read_models", lambda *_: [model])
    monkeypatch.setattr("lib.measure.backend_archives.build_row_archive", build)
    monkeypatch.setattr("lib.measure.backend_process.measure_in_turn", measure)
    monkeypatch.setattr("lib.measure.backend_process.write_reference", lambda *_: None)
    return built


def test_every_row_of_the_device_is_in_the_table_with_figures_or_a_reason(built, tmp_path, capsys):
    file = tmp_path / "new" / "rows.jsonl"
    assert benchmark_backends.main(["--jsonl", str(file), "--batch-sizes", "4"]) == 0
    assert built == ["pytorch fp32", "onnxruntime fp32"]
    output = capsys.readouterr()
    assert "onnxruntime fp32: too large" in output.err
    lines = {line[7:].split("  ")[0].strip(): line for line in output.out.splitlines() if line[:2] == "S "}
    assert list(lines) == [row.name for row in rows_of("cpu")]
    assert lines["pytorch fp32"].split()[3:6] == ["0.5000", "12.3", "4"]
    assert lines["pytorch bf16"].endswith("CPU without bfloat16")
    assert lines["onnxruntime fp32"].endswith("archive not built")
    assert lines["onnxruntime int8"].endswith("no INT8 file given")
    assert "GPU MiB" not in output.out  # no row has it
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["backend"] for row in rows] == list(lines)
    assert rows[0]["detector_ms"] == 12.3
    assert all(row["method"]["batch_sizes"] == [1, 4] and row["torch"] for row in rows)


def test_backends_can_be_left_out_and_a_missing_gpu_is_a_reason(built, capsys):
    assert benchmark_backends.main(["--backends", "openvino"]) == 0
    assert benchmark_backends.main(["--device", "cuda"]) == 0
    assert built == []
    out = capsys.readouterr().out
    assert out.count("left out") == len([row for row in rows_of("cpu") if row.backend != "openvino"])
    assert out.count("no GPU") == len(rows_of("cuda"))


@pytest.mark.parametrize("option", ["--weights", "--images", "--voc"])
def test_mistakes_are_found_before_anything_is_built(option, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_backends, "measure_model", lambda *_: pytest.fail("measured"))
    assert benchmark_backends.main([option, "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_archives_are_built_and_measured_from_end_to_end(tmp_path):
    class_names = ("one", "two", "three")
    torch.manual_seed(4)
    weights, int8_file, names = tmp_path / "ns.pth", tmp_path / "int8.onnx", tmp_path / "names.txt"
    names.write_text("\n".join(class_names))
    model = build_model(VARIANTS["Ns"], len(class_names), folded=False)
    torch.save({"model": model.state_dict()}, weights)
    export_onnx(folded_network(weights, None, len(class_names)), int8_file, class_names=class_names)
    content = onnx.load(int8_file)
    next(each for each in content.metadata_props if each.key == "precision").value = "int8"
    onnx.save(content, int8_file)
    file = tmp_path / "rows.jsonl"
    command = ["--weights", str(weights), "--class-names", str(names), "--onnx", str(int8_file)]
    command += ["--threads", "1", "--batch-sizes", "2", "--rounds", "2", "--slice-s", "0.01"]
    assert benchmark_backends.main([*command, "--jsonl", str(file)]) == 0
    rows = {row["backend"]: row for row in map(json.loads, file.read_text().splitlines())}
    measured = ["pytorch fp32", "onnxruntime fp32", "onnxruntime int8"]
    assert [name for name, row in rows.items() if "not_run" not in row] == measured
    for name in measured:
        assert rows[name]["runs_in"] == name
        assert 0 <= rows[name]["score_difference"] < 1e-4
    assert rows["pytorch fp32"]["score_difference"] == 0
    assert rows["onnxruntime fp32"]["score_difference"] > 0
    assert rows["onnxruntime fp32"]["archive_mb"] > rows["pytorch fp32"]["archive_mb"] + 1
