"""The command that recommends settings, and what it writes."""

import json
import zipfile

import torch
import yaml

from lib.archive.members import (
    BatchingSetting,
    archive_with_setting,
    batching_of,
    empty_archive,
    read_settings,
    settings_text_with,
)
from lib.measure import batch_sweep
from lib.measure.batch_sweep import BatchTime
from lib.measure.batching_search import Measurement, find_setting

import tune
from damoyolo.config import ServingConfig


def test_the_recommended_file_is_the_projects_with_the_settings_in_place(project_dir):
    text = (project_dir / "handler" / "model-config.yaml").read_text()
    setting = BatchingSetting(48, 5, 3)
    written = settings_text_with(text, setting)
    before, after = yaml.safe_load(text), yaml.safe_load(written)
    assert batching_of(after) == setting
    assert after["jobQueueSize"] == 4 * 48 * 3
    assert after["handler"]["graph_batch_sizes"] == [1, 2, 4, 8, 12, 16, 20, 24, 32, 48]
    assert after["responseTimeout"] == before["responseTimeout"]
    assert "# Requests that wait while every worker is busy" in written
    ServingConfig.from_mapping(after["handler"])
    assert settings_text_with(written, setting) == written


def write_archive(path):
    """The parts of an archive that its variants depend on."""
    manifest = {
        "model": {
            "modelName": "m",
            "handler": "h.py",
            "serializedFile": "w.pth",
            "configFile": "model-config.yaml",
        }
    }
    settings = {
        "batchSize": 8,
        "maxBatchDelay": 2,
        "minWorkers": 1,
        "maxWorkers": 1,
        "handler": {"variant": "T"},
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("model-config.yaml", yaml.safe_dump(settings))
        archive.writestr("h.py", "class Handler: ...")
        archive.writestr("w.pth", bytes(1000))
    return path


def test_an_archive_with_another_setting_differs_in_that_alone(tmp_path):
    source = write_archive(tmp_path / "m.mar")
    (tmp_path / "copy").mkdir()
    setting = BatchingSetting(3, 7, 2)
    copy = archive_with_setting(source, tmp_path / "copy", setting)
    assert batching_of(read_settings(copy)) == setting
    assert read_settings(copy)["handler"] == {"variant": "T", "graph_batch_sizes": [1, 2, 3]}
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(copy) as after:
        assert sorted(before.namelist()) == sorted(after.namelist())
        assert before.read("w.pth") == after.read("w.pth")


def test_the_empty_archive_serves_the_same_name_with_a_handler_that_does_nothing(tmp_path):
    source = write_archive(tmp_path / "m.mar")
    (tmp_path / "copy").mkdir()
    copy = empty_archive(source, tmp_path / "copy", BatchingSetting(3, 7, 2), answer_bytes=123)
    assert read_settings(copy)["answer_bytes"] == 123
    with zipfile.ZipFile(copy) as archive:
        assert "w.pth" not in archive.namelist()
        namespace = {"__name__": "h"}
        exec(archive.read("h.py"), namespace)

    class Context:
        """What the server gives a handler."""

        model_yaml_config = read_settings(copy)

    handler = namespace["EmptyHandler"]()
    handler.initialize(Context())
    assert [len(answer) for answer in handler.handle([{}, {}], Context())] == [123, 123]


def measured(setting):
    """A rate that grows with the batch size, and not with workers and delay."""
    return Measurement(100.0 + setting.batch_size, 5.0, 10.0)


def test_the_command_writes_the_recommendation_and_its_plot(tmp_path, monkeypatch, capsys):
    def search(_arguments, _images, space, gpus):
        searched.append((gpus, space.workers))
        return find_setting(measured, space, 100.0)

    def measure_batch(_archive, _images, _device, batch_size):
        return BatchTime(batch_size, 0.004, 0.004 if batch_size < 64 else 0.2, None)

    searched = []
    monkeypatch.setattr(tune, "_search", search)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(batch_sweep, "measure_batch", measure_batch)
    written, plot, rows = tmp_path / "new" / "model-config.yaml", tmp_path / "p.png", tmp_path / "rows.json"
    command = ["--p99-ms", "100", "--output", str(written), "--plot", str(plot), "--jsonl", str(rows)]
    command += ["--gpus", "1", "2", "--workers", "1", "3"]
    assert tune.main(command) == 0
    chosen = [row for row in map(json.loads, rows.read_text().splitlines()) if row.get("chosen")]
    assert searched == [(1, [1, 3]), (2, [2, 6])]
    # 64 takes longer than the budget by itself.
    assert [(row["gpus"], row["batch_size"]) for row in chosen] == [(1, 32), (2, 32)]
    assert yaml.safe_load(written.read_text())["batchSize"] == 32
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "recommended: batch 32" in capsys.readouterr().out
