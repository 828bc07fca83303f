"""Run a server that is a command: start it, wait until it is ready, end all its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from lib.cli import ScriptError
from lib.paths import PROJECT_DIR
from lib.server.local_http import answers_ok
from lib.server.process import is_listening

POLL_INTERVAL_S = 0.05
END_TIMEOUT_S = 60.0


@contextlib.contextmanager
def running_command(
    command: Sequence[str],
    ready_url: str,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> Iterator[float]:
    """Seconds from the start of the command until `ready_url` answered 200; ended by SIGTERM afterwards.

    ready_url: on this machine, with a port. environment: variables in addition to those of this process.

    Raises:
        ScriptError: the port is taken; or the command ends before, or is not ready in time: the message is
            then the last line that it printed.
    """
    _check_is_free(ready_url)
    with tempfile.TemporaryFile("w+") as output:
        started_s = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=PROJECT_DIR,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the server
        )
        try:
            while process.poll() is not None or not answers_ok(ready_url):
                if process.poll() is not None or time.monotonic() - started_s > timeout_s:
                    output.seek(0)
                    lines = output.read().strip().splitlines() or ["it printed nothing"]
                    raise ScriptError(lines[-1])
                time.sleep(POLL_INTERVAL_S)
            yield time.monotonic() - started_s
        finally:
            _end(process)


def _check_is_free(url: str) -> None:
    """Raise ScriptError if another server would answer in the place of the command."""
    port = urlsplit(url).port
    if port is None or is_listening(port):
        raise ScriptError(f"the port of {url} is taken; choose a free one")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command, and what it leaves behind of its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(END_TIMEOUT_S)
