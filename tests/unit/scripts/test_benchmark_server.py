"""The command that measures a server, against a stand-in."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from lib.server import metrics

import benchmark_server
from doubles.real_server import wait_until
from doubles.stand_in_server import StandInModel


def addresses(url):
    return ["--url", url, "--management-url", url, "--metrics-url", url, "--model", "m"]


def test_the_command_prints_a_table_and_writes_rows_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "COUNTERS_LAG_S", 0.0)
    rows, plot = tmp_path / "rows.json", tmp_path / "p.png"
    options = ["--concurrency", "2", "--rates", "20", "--limit-network", "1000", "--processes", "1"]
    options += ["--duration", "0.4", "--warm-up", "0.05", "--jsonl", str(rows), "--plot", str(plot)]
    with StandInModel() as model:
        assert benchmark_server.main([*addresses(model.base_url), *options]) == 0
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["load"] for row in written] == ["closed 2", "open 20/s"]
    assert written[0]["of_network"] == pytest.approx(written[0]["requests_per_s"] / 1000)
    assert (written[0]["batch_size"], written[0]["delay_ms"], written[0]["workers"]) == (4, 2, 1)
    assert "torch" in written[0]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "closed 2" in capsys.readouterr().out


def test_a_row_is_in_the_file_before_the_next_load_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "COUNTERS_LAG_S", 0.0)
    rows, written = tmp_path / "rows.jsonl", []
    rows.touch()
    monkeypatch.setattr(
        benchmark_server, "_report", lambda row: written.append(len(rows.read_text().splitlines()))
    )
    options = ["--concurrency", "1", "2", "3", "--processes", "1", "--duration", "0.2", "--warm-up", "0.05"]
    with StandInModel() as model:
        assert benchmark_server.main([*addresses(model.base_url), *options, "--jsonl", str(rows)]) == 0
    assert written == [0, 1, 2]
    assert len(rows.read_text().splitlines()) == 3


def test_a_quiet_command_prints_the_table_alone(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "COUNTERS_LAG_S", 0.0)
    options = ["--concurrency", "1", "--processes", "1", "--duration", "0.2", "--warm-up", "0.05"]
    with StandInModel() as model:
        assert benchmark_server.main([*addresses(model.base_url), *options, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "closed 1:" not in out
    assert "requests/s" in out


def test_ctrl_c_is_one_line_although_the_load_comes_from_processes_of_their_own(project_dir):
    options = ["--concurrency", "2", "--processes", "2", "--duration", "60"]
    with StandInModel() as model:
        process = subprocess.Popen(
            [sys.executable, "scripts/benchmark_server.py", *addresses(model.base_url), *options],
            cwd=project_dir,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a group of its own, as in a terminal
        )
        wait_until(lambda: sum(asked.method == "POST" for asked in list(model.asked)) > 10, "the load")
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "benchmark_server: interrupted\n")


def test_a_server_that_is_not_there_is_one_line(capsys):
    assert benchmark_server.main([*addresses("http://127.0.0.1:1"), "--concurrency", "1"]) == 1
    err = capsys.readouterr().err
    assert "refused" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--limit-empty", "--limit-network=measure", "--mps", "--gpus=2"])
def test_what_needs_an_archive_is_a_usage_error_without_one(option, capsys):
    with pytest.raises(SystemExit) as exit_info:
        benchmark_server.main(["--url", "http://127.0.0.1:1", option])
    assert exit_info.value.code == 2
    assert "--archive" in capsys.readouterr().err


def test_more_gpus_than_there_are_are_refused_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert benchmark_server.main(["--archive", "missing.mar", "--gpus", "1", "2"]) == 1
    assert "2 GPUs were requested; found: 1" in capsys.readouterr().err
