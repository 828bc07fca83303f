"""Let the networks of several workers run on a device in turn.

Two networks at the same time slow each other down: their kernels compete for the multiprocessors and the
cache, and each batch takes as long as both. In turn, each takes its own time, and the batches that wait are
answered one after the other.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class DeviceTurns:
    """A few turns that the processes of one user and temporary folder share on a device.

    count: how many may be taken at the same time; 0 lets everyone go on at once.

    A turn is a locked file, which the system releases when its process dies. Not thread-safe: one at a time.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        stem = f"damoyolo-{os.getuid()}-{device.type}{device.index or 0}-turn"
        folder = Path(tempfile.gettempdir())
        self._files: list[IO[str]] = [(folder / f"{stem}{index}.lock").open("w") for index in range(count)]
        self._next = os.getpid()

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
        for file in self._files:
            file.close()


def _nothing() -> None:
    pass
