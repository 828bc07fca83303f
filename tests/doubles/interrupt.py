"""Ctrl-C for a command that waits for a server."""

import signal
import subprocess
import sys
import threading

from doubles.stand_in_server import StandInServer, found


def interrupt_while_waiting(command, project_dir):
    """Exit code and stderr of a command that is interrupted while a silent server has its request."""
    arrived, release = threading.Event(), threading.Event()

    def silent(asked):
        arrived.set()
        release.wait(60)
        return found()

    with StandInServer(silent) as server:
        with subprocess.Popen(
            [sys.executable, *command, "--url", server.base_url],
            cwd=project_dir,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert arrived.wait(120)
            process.send_signal(signal.SIGINT)
            result = process.wait(30), process.stderr.read()
        release.set()
    return result
