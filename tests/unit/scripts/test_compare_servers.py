"""The command that compares servers, with stand-ins for them."""

import contextlib
import json
import zipfile

import pytest
import torch

from lib.archive.members import BatchingSetting
from lib.measure import compared_servers, reference_answers, server_rounds
from lib.measure.compared_servers import RunningServer, Server
from lib.measure.reference_answers import Reference
from lib.measure.request_forms import RAW

import compare_servers
from doubles.stand_in_server import Reply, StandInServer

FOUND = {"class_id": 1, "label": "RBC", "score": 0.9, "bbox": [1.0, 2.0, 3.0, 4.0]}
TEXT = json.dumps({"detections": [FOUND]}).encode()
SHORT = ["--device", "cpu", "--duration", "0.2", "--warm-up", "0.05", "--processes", "1", "--no-wrk"]


@pytest.fixture
def archive(tmp_path):
    """As much of one as the command itself reads."""
    settings = {**BatchingSetting(8, 2, 1).model_settings(), "handler": {}}
    with zipfile.ZipFile(tmp_path / "cells.mar", "w") as made:
        made.writestr("model-config.yaml", json.dumps(settings))
    return tmp_path / "cells.mar"


@pytest.fixture
def benches(monkeypatch):
    """Every server is a stand-in; the benches with which they are started."""
    seen = []

    @contextlib.contextmanager
    def start(bench):
        seen.append(bench)
        with StandInServer(lambda _: Reply(200, TEXT)) as server:
            yield RunningServer(server.base_url, 1.5)

    def read(_archive, images, *_):
        return Reference(100.0, "fp32", [TEXT] * len(images), [[FOUND]] * len(images))

    monkeypatch.setattr(
        server_rounds, "SERVERS", {name: Server(name, start, RAW) for name in compare_servers.NAMES}
    )
    monkeypatch.setattr(reference_answers, "read_reference", read)
    return seen


def test_the_command_knows_the_servers_that_there_are():
    assert list(compared_servers.SERVERS) == list(compare_servers.NAMES)


def test_all_get_the_same_settings_and_the_table_is_printed_and_written(benches, archive, tmp_path, capsys):
    rows, table = tmp_path / "rows.jsonl", tmp_path / "table.json"
    options = ["--archive", str(archive), "--concurrency", "1", "2", "--rounds", "1", "--batch-size", "4"]
    options += ["--max-batch-delay", "3", "--workers", "2", "--jsonl", str(rows), "--json", str(table)]
    assert compare_servers.main([*options, *SHORT]) == 0
    assert {
        (bench.setting.batch_size, bench.setting.delay_ms, bench.setting.workers) for bench in benches
    } == {(4, 3, 2)}
    assert benches[0].answer_bytes == len(TEXT)
    assert len(rows.read_text().splitlines()) == 2 * len(compare_servers.NAMES)
    written = json.loads(table.read_text())
    assert torch.__version__.startswith(written["facts"]["torch"])
    assert len(written["summary"]) == 2 * len(compare_servers.NAMES)
    assert "| litserve | 2 |" in capsys.readouterr().out


def test_a_second_call_adds_to_the_first_or_refuses(benches, archive, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    options = ["--archive", str(archive), "--concurrency", "1", "--rounds", "1", "--jsonl", str(rows), *SHORT]
    assert compare_servers.main([*options, "--servers", "torchserve"]) == 0
    assert compare_servers.main([*options, "--servers", "litserve", "--quiet"]) == 0
    out = capsys.readouterr().out.split("network alone")[2]
    assert "| torchserve | 1 |" in out
    assert "| litserve | 1 |" in out
    assert compare_servers.main([*options, "--batch-size", "3"]) == 1
    assert "has measurements with {'batch_size': 8}, not {'batch_size': 3}" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(benches, archive, tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def start(_bench):
        raise KeyboardInterrupt
        yield

    monkeypatch.setitem(server_rounds.SERVERS, "litserve", Server("litserve", start, RAW))
    options = ["--archive", str(archive), "--concurrency", "1", "--servers", "torchserve,litserve"]
    assert compare_servers.main([*options, *SHORT]) == 130
    captured = capsys.readouterr()
    assert "| torchserve | 1 |" in captured.out
    assert "interrupted" in captured.err


def test_wrong_answers_are_an_error(benches, archive, monkeypatch, capsys):
    @contextlib.contextmanager
    def start(_bench):
        with StandInServer(lambda _: Reply(200, b'{"detections": []}')) as server:
            yield RunningServer(server.base_url, 1.5)

    monkeypatch.setitem(server_rounds.SERVERS, "litserve", Server("litserve", start, RAW))
    options = ["--archive", str(archive), "--concurrency", "1", "--servers", "litserve", "--rounds", "1"]
    assert compare_servers.main([*options, *SHORT]) == 1
    assert "wrong" in capsys.readouterr().out


def test_an_unknown_server_is_refused(archive, capsys):
    assert compare_servers.main(["--archive", str(archive), "--servers", "nginx"]) == 1
    assert "--servers has nginx; accepted are torchserve, triton" in capsys.readouterr().err
