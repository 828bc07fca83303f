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
from typing import TYPE_CHECKING

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
            fcntl.flock(stack.enter_context(_own_file(path)), fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("no lock while the network is prepared: %s", error)
        yield


@contextlib.contextmanager
def _own_file(path: Path) -> Iterator[int]:
    """Descriptor of a file of this user; where it is missing, one that no other user can open.

    Raises:
        OSError: it is a link, no file, or another user's.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            raise OSError(f"{path} is not a file of this user")
        yield descriptor
    finally:
        os.close(descriptor)
