"""Let one worker at a time prepare its network on a device.

At start, cuDNN times its kernels and Triton compiles its own into a cache on disk. Workers doing that at the
same time would measure each other's load, choose worse kernels, and all compile the same ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def exclusive_device_lock(device: torch.device) -> Iterator[None]:
    """Wait until no other process of the same user and temporary folder holds the lock of this CUDA device.

    On a CPU there is no lock. The system releases the lock of a process that dies.
    """
    if device.type != "cuda":
        yield
        return
    path = Path(tempfile.gettempdir()) / f"damoyolo-{os.getuid()}-cuda{device.index or 0}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
