"""scripts/compare_servers.py with the real servers, for as short as it gets."""

import json
import subprocess
import sys

import pytest

from lib.cli import ScriptError

from doubles.answers import PRECISION
from doubles.triton_server import load_module

pytest.importorskip("litserve", reason="needs the package litserve (deploy/litserve/requirements.txt)")

NAMES = ("torchserve", "litserve", "empty", "plain-litserve", "plain-litserve-batches", "plain-torchserve")


@pytest.mark.slow
def test_all_servers_start_answer_alike_and_are_measured(project_dir, archive, tmp_path):
    if PRECISION != "fp32":
        pytest.skip("an answer may depend on the batch")
    names = [*NAMES, *(["triton"] if has_triton(project_dir, tmp_path) else [])]
    table = tmp_path / "table.json"
    command = [sys.executable, "scripts/compare_servers.py", "--archive", str(archive.path), "--rounds", "1"]
    command += ["--servers", ",".join(names), "--concurrency", "2", "--duration", "2", "--warm-up", "0.1"]
    command += ["--timeout", "60", "--no-wrk", "--json", str(table)]
    done = subprocess.run(command, cwd=project_dir, capture_output=True, text=True, timeout=550)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    rows = {row["server"]: row for row in json.loads(table.read_text())["summary"]}
    assert list(rows) == names, done.stdout
    assert {name: row["errors"] for name, row in rows.items()} == dict.fromkeys(names, 0)
    assert {name: row["wrong"] for name, row in rows.items()} == {**dict.fromkeys(names, 0), "empty": None}
    for name in {"torchserve", "litserve", "triton"} & set(names):
        assert rows[name]["equal"] == rows[name]["checked"] > 0


def has_triton(project_dir, folder):
    """Whether there is a Triton that runs here."""
    try:
        load_module(project_dir, "program").find_program(folder)
    except ScriptError:
        return False
    return True
