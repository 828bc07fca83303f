"""Let one worker at a time prepare its network on a device.

At start, cuDNN times its kernels and Triton compiles its own into a cache on disk. Workers doing that at the
same time would measure each other's load, choose worse kernels, and all compile the same ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive_device_lock(device: torch.device) -> Iterator[None]:
    """Wait until no other process of the same user and temporary folder holds the lock of this CUDA device.

    On a CPU there is no lock. The system releases the lock of a process that dies. Where the file cannot be
    used, which another user of a shared folder can bring about, the worker warns and goes on without it.
    """
    if device.type != "cuda":
        yield
        return
    path = Path(tempfile.gettempdir()) / f"damoyolo-{os.getuid()}-cuda{device.index or 0}.lock"
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context(open_own_file(path)), fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("no lock while the network is prepared: %s", error)
        yield


def open_own_file(path: Path) -> IO[str]:
    """Open a file of this user for locking; where it is missing, create one that no other user can open.

    Raises:
        OSError: it is a link, no file, or another user's.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o600)

    file = open(path, "a+", opener=opener)  # noqa: SIM115 (the caller closes it)
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
        file.close()
        raise OSError(f"{path} is not a file of this user")
    return file
