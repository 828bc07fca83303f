"""Let the networks of several workers run on a device in turn.

Many networks at the same time slow each other down: their kernels compete for the multiprocessors and the
cache, and every batch takes as long as all of them together. One alone leaves the device idle until the next
worker has seen that its turn has come, so two at a time are best (docs/served.md).
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

from damoyolo.cuda.startup_lock import open_own_file

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 1.0  # a worker's turn takes some milliseconds
POLL_INTERVAL_S = 0.0002  # the other of two turns keeps the device busy meanwhile


def device_turns(device: torch.device, count: int) -> DeviceTurns:
    """The turns of a CUDA device, whatever its index is for each process."""
    return DeviceTurns(str(torch.cuda.get_device_properties(device).uuid), count)


class DeviceTurns:
    """Turns that all processes of one user and temporary folder share.

    name: of what they are about. count: how many may be taken at the same time; 0 lets everyone go on.

    A turn is a locked file, which the system releases when its process dies. Where the files cannot be used,
    which another user of a shared folder can bring about, it warns and lets everyone go on. Not for several
    threads.
    """

    def __init__(self, name: str, count: int) -> None:
        stem = f"damoyolo-{os.getuid()}-{name}-turn"
        folder = Path(tempfile.gettempdir())
        self._files: list[IO[str]] = []
        weakref.finalize(self, _close_all, self._files)
        self._warned = False
        try:
            for index in range(count):
                self._files.append(open_own_file(folder / f"{stem}{index}.lock"))
        except OSError as error:
            logger.warning("the workers of a device do not take turns: %s", error)
            self.close()

    def take(self) -> Callable[[], None]:
        """Wait for a turn, but not for long, as its holder may hang; the result gives it back."""
        deadline_s = time.monotonic() + LONGEST_WAIT_S
        while self._files:
            # No call waits for one of several files, nor with a time limit.
            for file in self._files:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                except OSError as error:  # of a file system without locks
                    logger.warning("the workers of a device do not take turns: %s", error)
                    self.close()
                    return _nothing
                return functools.partial(fcntl.flock, file, fcntl.LOCK_UN)
            if time.monotonic() > deadline_s:
                self._warn_once()
                break
            time.sleep(POLL_INTERVAL_S)
        return _nothing

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "no turn on the device within %g s; going on without, now and whenever this happens again",
                LONGEST_WAIT_S,
            )

    def close(self) -> None:
        """Give up the files."""
        _close_all(self._files)


def _close_all(files: list[IO[str]]) -> None:
    while files:
        files.pop().close()


def _nothing() -> None:
    pass
