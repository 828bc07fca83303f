"""Workers that start at the same time take turns on a device.

A network that is made ready has cuDNN time its kernels, and Triton compile its own into a cache on disk.
Side by side, workers would time each other's load, choose worse kernels, and all compile the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def exclusive_device_lock(device: torch.device) -> Iterator[None]:
    """Wait until no other process of this user and temporary folder is inside with the same CUDA device.

    On a CPU nobody waits. The system ends the turn of a process that dies.
    """
    if device.type != "cuda":
        yield
        return
    path = Path(tempfile.gettempdir()) / f"damoyolo-{os.getuid()}-cuda{device.index or 0}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
