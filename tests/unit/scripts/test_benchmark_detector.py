"""The command that measures the network and the detector."""

import json

import pytest

import benchmark_detector
from benchmark_detector import main
from doubles.tiny_archive import write_tiny_archive


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    assert main(["--images", str(tmp_path)]) == 1
    assert "no *.jpg" in capsys.readouterr().err


def test_steps_are_printed_and_appended_with_the_environment(tmp_path, monkeypatch, capsys):
    row = {"step": "float32", "ap": 0.5}
    monkeypatch.setattr(benchmark_detector, "measure_network", lambda *_: [row])
    file = tmp_path / "new" / "rows.jsonl"
    assert main(["--device", "cpu", "--jsonl", str(file)]) == 0
    environment, heading, line = capsys.readouterr().out.splitlines()
    assert environment.startswith("python 3.")
    assert heading.startswith("step")
    assert line.split()[0] == "float32"
    written = json.loads(file.read_text())
    assert written.items() >= row.items()
    assert written["torch"]


def test_the_whole_detector_is_measured_in_each_precision(tmp_path, monkeypatch):
    def run_once(calls, _device):
        for call in calls.values():
            call()
        return {name: 0.2 if name.startswith("network") else 0.4 for name in calls}

    monkeypatch.setattr("lib.measure.timing.interleaved_medians_s", run_once)
    command = ["--detector", "--archive", str(write_tiny_archive(tmp_path / "archive")), "--device", "cpu"]
    command += ["--precisions", "fp32", "amp", "--batch-sizes", "1", "2", "--jsonl", str(tmp_path / "rows")]
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["batch_size"], row["precision"]) for row in rows] == [
        (1, "fp32"),
        (1, "amp"),
        (2, "fp32"),
        (2, "amp"),
    ]
    assert rows[2]["network_images_per_s"] == pytest.approx(10)
    assert rows[2]["detector_ms"] == pytest.approx(400)


def test_steps_are_chosen_by_name_and_an_unknown_one_lists_those_there_are(monkeypatch, tmp_path, capsys):
    chosen = []

    def measure(steps, _pixels):
        chosen.append([step.name for step in steps])
        return []

    monkeypatch.setattr("lib.measure.ablation.measure_ablation", measure)
    archive = write_tiny_archive(tmp_path / "archive")
    command = ["--device", "cpu", "--batch-sizes", "1", "--archive", str(archive), "--steps"]
    assert main([*command, "bf16, folded"]) == 0
    assert chosen == [["float32", "bf16, folded"]]
    assert main([*command, "faster"]) == 1
    assert "--steps names faster; the steps here are float32, " in capsys.readouterr().err
