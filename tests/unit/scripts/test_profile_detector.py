"""The profiling command: what it prints, writes and refuses."""

import json

import pytest

import profile_detector
from doubles.tiny_archive import write_tiny_archive


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib and its imports
def test_the_table_is_printed_and_rows_plot_and_trace_are_written(tmp_path, capsys):
    rows, plot, trace = tmp_path / "rows.json", tmp_path / "p.png", tmp_path / "trace.json"
    command = ["--archive", str(write_tiny_archive(tmp_path / "archive")), "--device", "cpu"]
    command += ["--batch-sizes", "1", "2", "--batches", "2", "--warm-up", "1"]
    command += ["--jsonl", str(rows), "--plot", str(plot), "--trace", str(trace)]
    assert profile_detector.main(command) == 0
    printed = capsys.readouterr().out
    assert "batch 2" in printed
    assert "nsys profile" in printed
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["batch_size"] for row in written} == {1, 2}
    assert {row["table"] for row in written} == {"stages"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"batch", "preprocess", "network", "postprocess"} <= names


@pytest.mark.parametrize("option", [["--nvtx"], ["--memory-snapshot", "x"]])
def test_what_needs_cuda_is_refused_without(option, capsys):
    assert profile_detector.main(["--device", "cpu", *option]) == 1
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib and its imports
def test_the_timeline_of_two_workers_is_drawn_and_their_traces_are_kept(tmp_path, capsys):
    picture = tmp_path / "timeline.png"
    command = ["--archive", str(write_tiny_archive(tmp_path / "archive")), "--device", "cpu"]
    command += ["--batch-sizes", "2", "--timeline", str(picture), "--workers", "2"]
    assert profile_detector.main(command) == 0
    assert "timeline.2.json" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(picture.with_suffix(".1.json").read_text())["traceEvents"]


def test_the_timeline_with_mps_is_refused_on_a_cpu(capsys):
    assert profile_detector.main(["--device", "cpu", "--timeline", "x.png", "--mps"]) == 1
    assert "CUDA" in capsys.readouterr().err
