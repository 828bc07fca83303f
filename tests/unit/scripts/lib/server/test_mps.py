"""Starting and stopping MPS, with a stand-in for its control program."""

import os
from pathlib import Path

import pytest

from lib.cli import ScriptError
from lib.server import mps

PROGRAM = """#!/bin/sh
echo "$@ [$(cat)] $CUDA_MPS_PIPE_DIRECTORY" >>"$0.log"
[ -d "$CUDA_MPS_PIPE_DIRECTORY" ] && [ -d "$CUDA_MPS_LOG_DIRECTORY" ] || exit 3
{ending}
"""


def put_program(folder, monkeypatch, ending="exit 0"):
    program = folder / mps.CONTROL_PROGRAM
    program.write_text(PROGRAM.format(ending=ending))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return program


def test_the_service_runs_while_entered(tmp_path, monkeypatch):
    program = put_program(tmp_path, monkeypatch)
    with mps.cuda_mps() as variables:
        pipe_dir = Path(variables["CUDA_MPS_PIPE_DIRECTORY"])
        assert pipe_dir.is_dir()
        assert len(program.with_name(f"{program.name}.log").read_text().splitlines()) == 1
    started, ended = program.with_name(f"{program.name}.log").read_text().splitlines()
    assert started == f"-d [] {pipe_dir}"
    assert ended == f" [quit -t 10] {pipe_dir}"
    assert not pipe_dir.parent.exists()


def test_a_service_that_does_not_start_is_reported(tmp_path, monkeypatch):
    put_program(tmp_path, monkeypatch, "echo no device >&2; exit 1")
    with pytest.raises(ScriptError, match="no device"), mps.cuda_mps():
        raise AssertionError


def test_without_the_driver_s_program_the_error_names_the_option_to_leave_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(mps, "FURTHER_FOLDERS", ())
    with pytest.raises(ScriptError, match="--mps"), mps.cuda_mps():
        raise AssertionError


def test_nothing_starts_where_it_is_not_wanted(tmp_path, monkeypatch):
    program = put_program(tmp_path, monkeypatch)
    with mps.cuda_mps(wanted=False) as variables:
        assert variables == {}
    assert not program.with_name(f"{program.name}.log").exists()
