"""How long serve.py waits for its server: to its end, or until only a new one helps."""

import contextlib
import signal
import subprocess
import sys
import threading

import pytest

from lib.server import process
from lib.server.process import TorchServeProcess

from doubles.stand_in_server import Reply, StandInServer

LOST = Reply(503, b'{"live":false,"models":{"damoyolo":"its workers failed"}}')


@contextlib.contextmanager
def server_at(url, project_dir, store, lifetime_s=60.0):
    """A server whose process only sleeps and whose inference address is another's."""
    server = TorchServeProcess(project_dir / "config.properties", store, overrides={"inference_address": url})
    command = [sys.executable, "-c", f"import time; time.sleep({lifetime_s})"]
    with subprocess.Popen(command) as server._process:
        try:
            yield server
        finally:
            server._process.kill()


def base(stand_in):
    return f"http://127.0.0.1:{stand_in.server_port}"


@pytest.fixture
def short_interval(monkeypatch):
    monkeypatch.setattr(process, "LIVENESS_INTERVAL_S", 0.05)


@pytest.mark.usefixtures("short_interval")
def test_a_model_that_has_lost_its_workers_ends_the_wait(project_dir, tmp_path):
    replies = [Reply(200), Reply(404), Reply(500), Reply(drop=True), LOST]
    stand_in = StandInServer(lambda _: replies.pop(0))
    with stand_in, server_at(base(stand_in), project_dir, tmp_path) as server:
        assert "lost all its workers for good" in server.wait()
        assert server._process.poll() is None  # `stop` ends it, with a drain
    assert not replies
    assert {asked.path for asked in stand_in.asked} == {"/v2/health/live"}


@pytest.mark.usefixtures("short_interval")
def test_a_server_that_answers_late_or_not_at_all_is_waited_for_to_its_end(
    project_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(process, "LIVENESS_TIMEOUT_S", 0.05)
    late = threading.Event()

    def answer(_):
        late.wait(30.0)
        return LOST

    with StandInServer(answer) as stand_in:
        for url in (base(stand_in), "http://127.0.0.1:9"):
            with server_at(url, project_dir, tmp_path, lifetime_s=0.5) as server:
                assert "ended by itself" in server.wait()
        assert stand_in.asked
        late.set()


@pytest.mark.usefixtures("short_interval")
def test_a_signal_interrupts_a_question_that_gets_no_answer(project_dir, tmp_path):
    class Stopped(Exception):  # noqa: N818 (as that of serve.py)
        pass

    def stop(*_):
        raise Stopped

    released = threading.Event()

    def answer(_):
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        released.wait(30.0)
        return LOST

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with StandInServer(answer) as stand_in, server_at(base(stand_in), project_dir, tmp_path) as server:
            with pytest.raises(Stopped):
                server.wait()
            released.set()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
