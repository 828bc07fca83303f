"""The table of backends from end to end with a small network, resuming, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from lib.measure.backend_process import Method, WorkerError, WorkerProcess
from lib.measure.backend_rows import Machine, rows_of
from lib.onnx.export import export_onnx
from lib.packaging.class_names import COCO_CLASS_NAMES
from lib.packaging.weights import folded_network

import benchmark_backends
import build_archive
from benchmark_backends import Archive, Model, TableError, build_row_archive, measured_before, read_models
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS

CLASS_NAMES = ("one", "two", "three")
FRAME = """By hand.
<!-- table of cpu: begin -->
<!-- table of cpu: end -->
<!-- table of cuda: begin -->
<!-- table of cuda: end -->
"""
CPU_ONLY = Machine(
    has_gpu=False,
    libraries=frozenset({"torch", "onnxruntime", "onnx", "onnxscript"}),
    onnxruntime_has_cuda=False,
    cpu_computes_bf16=False,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Ns that was never trained, in the form of a trained one."""
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("weights") / "ns.pth"
    model = build_model(VARIANTS["Ns"], len(CLASS_NAMES), folded=False)
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def int8_file(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of these weights that calls itself quantised."""
    path = tmp_path_factory.mktemp("int8") / "ns_int8.onnx"
    export_onnx(folded_network(weights, None, len(CLASS_NAMES)), path, class_names=CLASS_NAMES)
    _say_of(path, "precision", "int8")
    return path


def _say_of(path: Path, entry: str, value: str) -> None:
    written = onnx.load(path)
    for each in written.metadata_props:
        if each.key == entry:
            each.value = value
    onnx.save(written, path)


@pytest.fixture
def class_names_file(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(CLASS_NAMES))
    return path


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "backends.md"
    path.write_text(FRAME)
    return path


def cells(document: Path) -> dict[str, list[str]]:
    """What follows the name, by the name of the row; of both sections, rows of the CPU first."""
    found: dict[str, list[str]] = {}
    for line in document.read_text().splitlines():
        if line.startswith("| Ns"):
            _, name, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(name, rest)
    return found


def test_the_command_measures_each_backend_in_a_process_and_measures_nothing_twice(
    weights: Path,
    int8_file: Path,
    class_names_file: Path,
    document: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Machine, "here", classmethod(lambda _: CPU_ONLY))
    rows_file = tmp_path / "output" / "rows.jsonl"
    arguments = ["--weights", str(weights), "--class-names", str(class_names_file), "--threads", "1"]
    arguments += ["--onnx", str(int8_file), "--document", str(document), "--json", str(rows_file)]
    arguments += ["--batch-sizes", "2", "--rounds", "2", "--slice-s", "0.01"]
    assert benchmark_backends.main(arguments) == 0

    rows = {row["backend"]: row for row in map(json.loads, rows_file.read_text().splitlines())}
    measured = ["pytorch fp32", "onnxruntime fp32", "onnxruntime int8"]
    assert [name for name, row in rows.items() if "not_run" not in row] == measured
    assert len({row["turn"] for row in rows.values()}) == 1
    for name in measured:
        row = rows[name]
        assert row["runs_in"] == name
        assert row["variant"] == "Ns"
        assert 0 <= row["score_difference"] < 1e-4
        assert row["detector_ms"] == pytest.approx(1e3 / row["images_per_s"])
        assert row["best_images_per_s"] == max(row["images_per_s_by_batch_size"].values())
        assert row["best_batch_size"] in (1, 2)
        assert 100 < row["resident_mib"] <= row["peak_mib"]
        assert row["start_s"] > 0
        assert row["import_s"] > 0
        assert row["archive_mb"] > 1
        assert row["method"]["batch_sizes"] == [1, 2]
    assert rows["pytorch fp32"]["score_difference"] == 0
    assert rows["onnxruntime fp32"]["score_difference"] > 0
    assert rows["onnxruntime fp32"]["archive_mb"] > rows["pytorch fp32"]["archive_mb"] + 1

    assert "; batch sizes 1, 2, medians of 2 rounds of 0.01 s." in document.read_text()
    table = cells(document)
    assert set(table) == {row.name for device in ("cpu", "cuda") for row in rows_of(device)}
    assert table["pytorch fp32"][0] == "not run"  # no data set for an AP
    assert table["pytorch bf16"][0] == "not run (CPU without bfloat16)"
    assert table["openvino fp32"][0] == "not run (openvino not installed)"
    assert table["tensorrt fp16"][0] == "not run (no GPU)"

    # Again: all is known, down to the figures in the table.
    before = document.read_text()
    monkeypatch.setattr(build_archive, "verify_archive", lambda _: [])  # done for the first ones
    monkeypatch.setattr(benchmark_backends, "measure_in_turn", lambda *_: pytest.fail("measured again"))
    assert benchmark_backends.main(arguments) == 0
    assert document.read_text() == before
    assert len(rows_file.read_text().splitlines()) == len(measured)

    # Other batch sizes make other figures; --fresh makes them again.
    asked: list[list[str]] = []

    def measure(folders: dict[str, Path], *_: Any) -> dict[str, dict[str, Any]]:
        asked.append(list(folders))
        return {name: {"not_run": "failed: Test"} for name in folders}

    monkeypatch.setattr(benchmark_backends, "measure_in_turn", measure)
    arguments += ["--backends", "pytorch"]
    assert benchmark_backends.main([*arguments, "--fresh"]) == 0
    assert benchmark_backends.main([*arguments, "--rounds", "3"]) == 0
    assert asked == [["pytorch fp32"], ["pytorch fp32"]]
    assert cells(document)["pytorch fp32"][0] == "not run (failed: Test)"
    # A row that failed is no figure: the older one counts.
    assert benchmark_backends.main(arguments) == 0
    assert cells(document)["pytorch fp32"] == table["pytorch fp32"]
    assert cells(document)["onnxruntime fp32"][0] == "not run (left out)"


def test_on_a_gpu_its_section_alone_is_written(
    weights: Path, class_names_file: Path, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document.write_text(FRAME.replace("cpu: begin -->\n", "cpu: begin -->\nMeasured on a CPU.\n"))
    libraries = frozenset({"torch"})
    on_gpu = Machine(True, libraries, onnxruntime_has_cuda=False, cpu_computes_bf16=True)
    monkeypatch.setattr(Machine, "here", classmethod(lambda _: on_gpu))
    monkeypatch.setattr(benchmark_backends, "machine_line", lambda device: f"a machine for {device}")
    monkeypatch.setattr(
        benchmark_backends, "build_row_archive", lambda *_: Archive(None, reason="archive not built")
    )
    arguments = ["--weights", str(weights), "--class-names", str(class_names_file)]
    arguments += ["--document", str(document), "--json", str(tmp_path / "rows.jsonl")]
    assert benchmark_backends.main(arguments) == 0
    before, after = document.read_text().split("<!-- table of cuda: begin -->")
    assert (
        before
        == FRAME.replace("cpu: begin -->\n", "cpu: begin -->\nMeasured on a CPU.\n").split(
            "<!-- table of cuda: begin -->"
        )[0]
    )
    assert "| Ns | pytorch fp16 | not run (archive not built) |" in after
    assert "| Ns | onnxruntime fp32 | not run (onnxruntime not installed) |" in after
    assert "| Ns | tensorrt int8 | not run (tensorrt not installed) |" in after


def test_measured_gpu_rows_survive_a_run_without_a_gpu(
    weights: Path, class_names_file: Path, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document.write_text(FRAME.replace("cuda: begin -->\n", "cuda: begin -->\nMeasured on a GPU.\n"))
    monkeypatch.setattr(Machine, "here", classmethod(lambda _: CPU_ONLY))
    monkeypatch.setattr(
        benchmark_backends, "build_row_archive", lambda *_: Archive(None, reason="archive not built")
    )
    arguments = ["--weights", str(weights), "--class-names", str(class_names_file), "--backends", "pytorch"]
    arguments += ["--document", str(document), "--json", str(tmp_path / "rows.jsonl")]
    assert benchmark_backends.main(arguments) == 0
    text = document.read_text()
    assert "<!-- table of cuda: begin -->\nMeasured on a GPU.\n<!-- table of cuda: end -->" in text
    assert "| Ns | onnxruntime fp32 | not run (left out) |" in text


def test_an_int8_file_goes_to_the_weights_that_it_is_made_from(weights: Path, int8_file: Path) -> None:
    assert read_models([str(weights)], CLASS_NAMES, [int8_file]) == [
        Model(weights, "Ns", CLASS_NAMES, int8_file)
    ]


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("weights_digest", "0", "not among --weights"),
        ("variant", "S", "variant S that are not among --weights"),
        ("precision", "fp32", "of precision fp32; accepted are int8"),
    ],
)
def test_a_file_that_belongs_to_no_row_is_refused(
    weights: Path, int8_file: Path, tmp_path: Path, entry: str, value: str, message: str
) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(int8_file.read_bytes())
    _say_of(other, entry, value)
    with pytest.raises(TableError, match=message):
        read_models([str(weights)], CLASS_NAMES, [other])


def test_two_of_a_variant_are_refused(weights: Path, int8_file: Path) -> None:
    with pytest.raises(TableError, match="both of variant Ns"):
        read_models([str(weights), str(weights)], CLASS_NAMES, [])
    with pytest.raises(TableError, match="both INT8 files of variant Ns"):
        read_models([str(weights)], CLASS_NAMES, [int8_file, int8_file])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--images", "nowhere"], "no *.jpg in nowhere"),
        (["--voc", "nowhere"], "nowhere"),
    ],
    ids=["weights", "images", "data set"],
)
def test_the_command_says_what_is_wrong_before_it_measures(
    arguments: Sequence[str],
    message: str,
    document: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark_backends, "measure_model", lambda *_: pytest.fail("measured"))
    common = ["--document", str(document), "--json", str(tmp_path / "rows.jsonl")]
    assert benchmark_backends.main([*arguments, *common]) == 1
    assert message in capsys.readouterr().err
    assert document.read_text() == FRAME


def test_of_equal_rows_the_last_with_figures_counts(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert measured_before(file, {}) is None
    wanted = {"backend": "pytorch fp32", "archive_digest": "1"}
    rows = [
        {**wanted, "ap": 0.1},
        {**wanted, "ap": 0.2},
        {**wanted, "not_run": "failed"},
        {**wanted, "archive_digest": "2", "ap": 0.3},
        {**wanted, "backend": "openvino fp32", "ap": 0.4},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measured_before(file, wanted) == rows[1]
    assert measured_before(file, {**wanted, "machine": "another"}) is None


def test_a_tensorrt_archive_is_built_by_the_script_that_proves_backends(
    weights: Path, int8_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    def refuse(command: list[str], **_: Any) -> Any:
        called.append(command)
        return benchmark_backends.subprocess.CompletedProcess(command, 1, "", "no TensorRT")

    monkeypatch.setattr(benchmark_backends.subprocess, "run", refuse)
    model = Model(weights, "Ns", CLASS_NAMES, int8_file)
    method = Method((1,), 1, 0.1, tmp_path, voc=tmp_path / "data")
    for row in rows_of("cuda"):
        if row.backend == "tensorrt":
            archive = build_row_archive(model, row, method, tmp_path / row.arithmetic)
            assert archive == Archive(None, reason="backend not built or refused")
    import build_tensorrt

    parsed = [build_tensorrt._parser().parse_args(command[2:]) for command in called]
    assert [each.precision for each in parsed] == ["fp32", "fp16", None]
    assert parsed[2].onnx == int8_file
    assert all(each.weights == str(weights) and each.voc == tmp_path / "data" for each in parsed)
    assert parsed[0].onnx.is_file()


def test_a_process_that_cannot_load_its_archive_says_why(project_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model-config.yaml").write_text(f"handler: {{class_names: {list(COCO_CLASS_NAMES)}}}\n")
    method = Method((1,), 1, 0.1, project_dir / "tests/data/smears")
    monkey_path = project_dir / "handler"  # stands for the modules of the archive
    (tmp_path / "damoyolo").symlink_to(monkey_path / "damoyolo")
    with pytest.raises(WorkerError, match=r"damoyolo\.pth") as raised:
        WorkerProcess(tmp_path, "cpu", method)
    assert raised.value.kind in ("CheckpointError", "FileNotFoundError")
