"""The server's limit on answers, read from a process that was started like the server."""

import os
import subprocess
import sys

import pytest

from damoyolo.server_settings import DEFAULT_MAX_RESPONSE_SIZE, read_max_response_size


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Starts a process with arguments in a folder; gives its process id."""
    monkeypatch.delenv("TS_CONFIG_FILE", raising=False)
    started = []

    def start(*arguments):
        command = [sys.executable, "-c", "print(flush=True); input()", *arguments]
        process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        process.stdout.readline()  # it runs
        return process.pid

    yield start
    for process in started:
        process.communicate(b"\n", timeout=60)


def test_the_limit_is_that_of_the_file_that_the_server_was_started_with(server, tmp_path):
    (tmp_path / "config.properties").write_text("max_response_size=1\n")
    (tmp_path / "other.properties").write_text(
        "# max_response_size=2\nmax_request_size=3\nmax_response_size = 34000000 \nx=max_response_size=4\n"
    )
    assert read_max_response_size(server("-f", "other.properties", "-s", "store")) == 34_000_000
    assert read_max_response_size(server("-f", str(tmp_path / "other.properties"))) == 34_000_000
    assert read_max_response_size(server("-s", "store")) == 1


def test_the_environment_names_the_file_first(server, tmp_path, monkeypatch):
    (tmp_path / "config.properties").write_text("max_response_size=1\n")
    (tmp_path / "other.properties").write_text("max_response_size: 5\n")
    pid = server("-f", "config.properties")
    monkeypatch.setenv("TS_CONFIG_FILE", "other.properties")
    assert read_max_response_size(pid) == 5


@pytest.mark.parametrize("text", [None, "", "max_response_size=\n", "max_response_size=many\n"])
def test_without_a_setting_it_is_the_servers_default(server, tmp_path, text):
    if text is not None:
        (tmp_path / "config.properties").write_text(text)
    assert read_max_response_size(server()) == DEFAULT_MAX_RESPONSE_SIZE
    assert read_max_response_size(server("-f", "absent.properties")) == DEFAULT_MAX_RESPONSE_SIZE
    assert read_max_response_size(server("-f")) == DEFAULT_MAX_RESPONSE_SIZE


def test_of_a_process_that_is_gone_it_is_the_servers_default():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(timeout=60)
    assert read_max_response_size(child.pid) == DEFAULT_MAX_RESPONSE_SIZE
    assert os.getpid() != child.pid
