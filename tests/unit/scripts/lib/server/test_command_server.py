"""A server that is a command: ready, not ready, and ended with what it has started."""

import subprocess
import sys

import psutil
import pytest

from lib.cli import ScriptError
from lib.server.command_server import running_command
from lib.server.process import free_ports

from doubles.real_server import wait_until
from doubles.stand_in_server import StandInServer, found

SERVER = "import http.server, os, subprocess, sys\n"
SERVER += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
SERVER += "print(os.environ.get('SOME'), child.pid, file=open(sys.argv[2], 'w'))\n"
SERVER += "http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')"


def test_it_yields_once_the_server_answers_and_ends_everything_that_was_started(tmp_path):
    (port,) = free_ports(1)
    written = tmp_path / "written"
    command = [sys.executable, "-c", SERVER, str(port), str(written)]
    with running_command(command, f"http://127.0.0.1:{port}/", 30.0, {"SOME": "value"}) as start_s:
        assert 0 < start_s < 30
        value, child = written.read_text().split()
        assert value == "value"
        child = psutil.Process(int(child))
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the end", 10.0)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('one'); raise SystemExit('no such model')", "no such model"),
        ("pass", "it printed nothing"),
        ("import time; print('waiting', flush=True); time.sleep(60)", "waiting"),
    ],
)
def test_one_that_is_not_ready_in_time_fails_with_its_last_line(code, reason):
    (port,) = free_ports(1)
    context = running_command([sys.executable, "-c", code], f"http://127.0.0.1:{port}/", 0.7)
    with pytest.raises(ScriptError, match=reason), context:
        pass


def test_another_server_on_the_port_is_not_taken_for_the_command(tmp_path):
    started = tmp_path / "started"
    command = [sys.executable, "-c", f"open({str(started)!r}, 'w')"]
    with (
        StandInServer(lambda asked: found()) as other,
        pytest.raises(ScriptError, match=rf"the port of {other.base_url} is taken"),
        running_command(command, other.base_url, 30.0),
    ):
        pass
    assert not started.exists()


def test_a_command_that_has_ended_is_not_ready_whoever_answers(monkeypatch):
    """Another server may take the port after the check."""
    monkeypatch.setattr("lib.server.command_server.answers_ok", lambda url: True)
    (port,) = free_ports(1)
    command = [sys.executable, "-c", "raise SystemExit('address in use')"]
    ended = subprocess.Popen.poll
    monkeypatch.setattr(subprocess.Popen, "poll", lambda process: process.wait(30) and ended(process))
    context = running_command(command, f"http://127.0.0.1:{port}/", 30.0)
    with pytest.raises(ScriptError, match="address in use"), context:
        pass
