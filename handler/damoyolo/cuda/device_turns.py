"""Let the networks of several workers run on a device in turn.

Many networks at the same time slow each other down: their kernels compete for the multiprocessors and the
cache, and every batch takes as long as all of them together. One alone leaves the device idle until the next
worker has seen that its turn has come, so two at a time are best (docs/performance.md).
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

from damoyolo.cuda.startup_lock import open_own_file

logger = logging.getLogger(__name__)


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
        self._next = os.getpid()
        try:
            for index in range(count):
                self._files.append(open_own_file(folder / f"{stem}{index}.lock"))
        except OSError as error:
            logger.warning("the workers of a device do not take turns: %s", error)
            self.close()

    def take(self) -> Callable[[], None]:
        """Wait for a turn; the result gives it back."""
        if not self._files:
            return _nothing
        for file in self._files:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return lambda: fcntl.flock(file, fcntl.LOCK_UN)
        # Waiting for one of several is not possible; another one each time, so that all are waited for.
        self._next += 1
        file = self._files[self._next % len(self._files)]
        fcntl.flock(file, fcntl.LOCK_EX)
        return lambda: fcntl.flock(file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give up the files."""
        _close_all(self._files)


def _close_all(files: list[IO[str]]) -> None:
    while files:
        files.pop().close()


def _nothing() -> None:
    pass
