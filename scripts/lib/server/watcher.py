"""Clean up after a command that was killed: SIGKILL and a crash leave it no time to do so itself.

A second process waits for the end of a pipe whose other side this process holds. Imports the standard library
alone, because this file is also the program of that process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATIENCE_S = 10.0


class Watcher:
    """While it runs, the end of this process kills a process group, runs a command and removes a folder.

    folder: is removed, last.
    command, text: run with `text` as its input, before.
    environment: of the command.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str] = (),
        text: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            # The readers of this process's output would wait for the end of the watcher, too.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            start_new_session=True,  # out of reach of Ctrl-C
            text=True,
        )
        self._tell(folder=str(folder), command=list(command), text=text)

    def kill_group_too(self, group: int) -> None:
        """Name the process group to kill."""
        self._tell(group=group)

    def _tell(self, **task: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed: nobody watches any more
            print(json.dumps(task), file=self._process.stdin, flush=True)

    def dismiss(self) -> None:
        """End the watcher; it does nothing any more."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def _kill_group(group: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.02)


def main() -> None:
    """Wait for the end of standard input, whose lines are JSON objects that say what to do then."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    task: dict[str, Any] = {"group": 0, "command": [], "text": "", "folder": ""}
    for line in sys.stdin:
        task.update(json.loads(line))
    if task["group"]:
        _kill_group(task["group"])
    if task["command"]:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                task["command"],
                input=task["text"],
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=3 * PATIENCE_S,
            )
    if task["folder"]:
        shutil.rmtree(task["folder"], ignore_errors=True)


if __name__ == "__main__":
    main()
