"""With which command each server is started."""

import contextlib
import json
import zipfile

import pytest

from lib.archive.members import BatchingSetting, batching_of, read_settings
from lib.measure import compared_servers
from lib.measure.compared_servers import SERVERS, Bench
from lib.server.served_archive import ServedModel

SETTING = BatchingSetting(16, 3, 2)


@pytest.fixture
def bench(tmp_path):
    settings = {**BatchingSetting(8, 2, 1).model_settings(), "handler": {}}
    model = {"modelName": "cells", "handler": "damoyolo_handler.py"}
    with zipfile.ZipFile(tmp_path / "cells.mar", "w") as made:
        made.writestr("model-config.yaml", json.dumps(settings))
        made.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": model}))
    return Bench(tmp_path / "cells.mar", SETTING, "cpu", {"SOME": "value"}, 100, api_servers=3)


@pytest.fixture
def started(monkeypatch):
    """Command as a dictionary of options, address of readiness, environment."""
    seen = {}

    @contextlib.contextmanager
    def run(command, ready_url, timeout_s, environment):
        seen.update(command=command, ready_url=ready_url, environment=environment)
        if "--archive" in command:
            archive = command[command.index("--archive") + 1]
            seen["setting"] = batching_of(read_settings(archive))
        yield 1.5

    monkeypatch.setattr(compared_servers, "running_command", run)
    return seen


@pytest.mark.parametrize(
    ("name", "ready", "path"),
    [
        ("litserve", "/health", "/predict"),
        ("triton", "/v2/health/ready", "/v2/models/cells/infer"),
    ],
)
def test_the_servers_of_deploy_get_the_archive_with_the_same_settings(bench, started, name, ready, path):
    with SERVERS[name].start(bench) as running:
        command = started["command"]
        options = dict(zip(command[2::2], command[3::2], strict=True))
        assert command[1].endswith(f"deploy/{name}/serve.py")
        assert started["setting"] == SETTING
        assert (options["--batch-size"], options["--max-batch-delay"], options["--workers"]) == (
            "16",
            "3",
            "2",
        )
        assert options["--device"] == "cpu"
        assert options.get("--api-servers") == ("3" if name == "litserve" else None)
        address = f"http://127.0.0.1:{options['--port']}"
        assert (running.url, running.start_s) == (address + path, 1.5)
        assert started["ready_url"] == address + ready
        assert started["environment"]["SOME"] == "value"


@pytest.mark.parametrize(
    ("name", "numbers"), [("plain-litserve", ["1", "1", "1"]), ("plain-litserve-batches", ["2", "16", "3"])]
)
def test_plain_litserve_has_its_defaults_or_the_settings_of_all(bench, started, name, numbers):
    with SERVERS[name].start(bench):
        assert started["command"][1:3] == ["-m", "lib.measure.plain.litserve_app"]
        assert started["command"][-3:] == numbers  # workers, batch size, delay


@pytest.mark.parametrize(
    ("name", "member"), [("torchserve", "model-config.yaml"), ("empty", "damoyolo_handler.py")]
)
def test_torchserve_gets_a_changed_copy_and_no_gpu_if_none_is_wanted(bench, monkeypatch, name, member):
    seen = {}

    @contextlib.contextmanager
    def serve(archive, environment):
        seen.update(setting=batching_of(read_settings(archive)), environment=environment)
        with zipfile.ZipFile(archive) as opened:
            seen["names"] = opened.namelist()
        yield ServedModel("http://a", "http://b", "http://c", "cells")

    monkeypatch.setattr(compared_servers, "serve_archive", serve)
    with SERVERS[name].start(bench) as running:
        assert running.url == "http://a/predictions/cells"
    assert seen["setting"] == SETTING
    assert seen["environment"] == {"SOME": "value", "CUDA_VISIBLE_DEVICES": ""}
    assert member in seen["names"]
