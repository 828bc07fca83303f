"""Starting and stopping MPS, with a stand-in for its control program."""

import os
import signal
from pathlib import Path

import pytest

from lib.cli import ScriptError
from lib.server import mps


class InterruptedByTestError(Exception):
    """As a stop signal raises one."""


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


ONLY_STARTING = '[ "$1" != -d ] || {}'


def require_quit(program):
    """The service was told to end, and its folder is gone."""
    started, ended = program.with_name(f"{program.name}.log").read_text().splitlines()
    assert started.startswith("-d ")
    _, _, pipe_dir = ended.rpartition(" ")
    assert ended == f" [quit -t 10] {pipe_dir}"
    assert not Path(pipe_dir).parent.exists()


def test_a_service_whose_start_fails_is_ended_as_it_may_run_all_the_same(tmp_path, monkeypatch):
    program = put_program(tmp_path, monkeypatch, ONLY_STARTING.format("exit 1"))
    with pytest.raises(ScriptError, match="-d failed"), mps.cuda_mps():
        raise AssertionError
    require_quit(program)


def test_a_service_whose_start_takes_too_long_is_ended(tmp_path, monkeypatch):
    program = put_program(tmp_path, monkeypatch, ONLY_STARTING.format("exec sleep 60"))
    monkeypatch.setattr(mps, "CONTROL_TIMEOUT_S", 2.0)
    with pytest.raises(ScriptError, match="timed out"), mps.cuda_mps():
        raise AssertionError
    require_quit(program)


def test_a_service_whose_start_a_signal_interrupts_is_ended(tmp_path, monkeypatch):
    ending = f"{{ kill -ALRM {os.getpid()}; exec sleep 60; }}"
    program = put_program(tmp_path, monkeypatch, ONLY_STARTING.format(ending))

    def stop(*_):
        raise InterruptedByTestError

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(InterruptedByTestError), mps.cuda_mps():
            raise AssertionError
    finally:
        signal.signal(signal.SIGALRM, before)
    require_quit(program)


def test_an_error_at_the_end_does_not_hide_that_of_the_start(tmp_path, monkeypatch):
    put_program(tmp_path, monkeypatch, "echo no device >&2; [ $1 ] && exit 1; exec sleep 60")
    monkeypatch.setattr(mps, "CONTROL_TIMEOUT_S", 2.0)
    with pytest.raises(ScriptError, match="no device"), mps.cuda_mps():
        raise AssertionError
