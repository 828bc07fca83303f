"""Print to a stream that may break, fill up or stop being read, without ever waiting for it."""

from __future__ import annotations

import os
import select
import threading
import time
from queue import Full, Queue
from typing import TextIO

QUEUED_LINES = 1000
MISSING_LINES = b"(lines are missing here; the log file has them)\n"


class DroppingOutput:
    """Lines for a stream, written by a thread of their own; what the stream does not take is dropped.

    A closed pipe, a full disk and a full pipe that nobody reads cost the lines and nothing else. A disk or
    pipe that has room again gets the lines from then on, after a note that some are missing.

    stream: a text file. Nothing is written to None or a file without a descriptor.
    """

    def __init__(self, stream: TextIO | None, queued_lines: int = QUEUED_LINES) -> None:
        try:
            # Its own one, whose number stands for nothing else after the stream is closed.
            self._descriptor = None if stream is None else os.dup(stream.fileno())
        except (OSError, ValueError):  # closed, or only in memory
            self._descriptor = None
        self._lines: Queue[bytes] = Queue(queued_lines)
        self._incomplete = False
        # To the descriptor: the interpreter waits at its end for the lock of a stream that is being written.
        if self._descriptor is not None:
            threading.Thread(target=self._write_lines, name="dropping-output", daemon=True).start()

    def print(self, line: str) -> None:
        """Write the line, with a line end; returns at once."""
        if self._descriptor is None:
            return
        try:
            self._lines.put_nowait(f"{line}\n".encode(errors="backslashreplace"))
        except Full:
            self._incomplete = True

    def flush(self, timeout_s: float = 1.0) -> None:
        """Wait until the stream has taken all lines, at most for this time."""
        deadline = time.monotonic() + timeout_s
        while self._descriptor is not None and self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def _write_lines(self) -> None:
        while True:
            line = self._lines.get()
            try:
                if self._incomplete:
                    self._write(MISSING_LINES)
                    self._incomplete = False
                self._write(line)
            except OSError:  # nobody reads, or the disk is full
                self._incomplete = True
            self._lines.task_done()

    def _write(self, text: bytes) -> None:
        assert self._descriptor is not None
        while text:
            try:
                text = text[os.write(self._descriptor, text) :]
            except BlockingIOError:  # the other side has set the pipe to non-blocking
                select.select((), (self._descriptor,), ())
