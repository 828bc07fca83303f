"""Tell what an unexpected exception means: too little memory, a lost device, or neither.

This is the only place with that rule. The exception alone does not tell: an error of a CUDA kernel surfaces
at whatever call comes next, in the type of that call (RuntimeError from Triton and nvJPEG, AcceleratorError
from PyTorch), and an AcceleratorError may leave the device usable. Therefore the device is tried.
"""

from __future__ import annotations

import enum
import errno
import functools

import torch
from torch import Tensor

from damoyolo.errors import DeviceLostError

_CUDA_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation; of pinned host memory, too
# In errors of PyTorch's CPU allocator, Triton, cuBLAS, cuDNN, nvJPEG, C++ and the other backends; lower case.
_OUT_OF_MEMORY_TEXTS = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "out_of_memory",
    "alloc_failed",
    "allocator_failure",
    "bad_alloc",
)


class Failure(enum.Enum):
    """What an exception means for the process.

    OUT_OF_MEMORY: less work at once can succeed. DEVICE_LOST: only a new process can serve again.
    OTHER: what was asked for failed, and other work is not affected.
    """

    OUT_OF_MEMORY = enum.auto()
    DEVICE_LOST = enum.auto()
    OTHER = enum.auto()


def classify(error: BaseException, device: torch.device) -> Failure:
    """What `error` means. Waits for all work on a CUDA device."""
    if isinstance(error, DeviceLostError) or not is_alive(device):
        return Failure.DEVICE_LOST
    return Failure.OUT_OF_MEMORY if _is_out_of_memory(error) else Failure.OTHER


def is_alive(device: torch.device) -> bool:
    """Whether the device still computes. Call it once at start, when there is memory for what it needs."""
    if device.type != "cuda":
        return True
    # Twice: the first call may report what an earlier one left behind, while a lost device fails every call.
    return _try_device(device) or _try_device(device)


def _try_device(device: torch.device) -> bool:
    try:
        _probe(device).add_(1)
        torch.cuda.synchronize(device)
    except Exception as error:
        return _is_out_of_memory(error)
    return True


def free_cached_memory(device: torch.device) -> None:
    """Give back the device memory and the pinned host memory that PyTorch keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # public from torch 2.13 on, as torch.accelerator.empty_host_cache


@functools.cache
def _probe(device: torch.device) -> Tensor:
    return torch.zeros(1, device=device)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, torch.AcceleratorError) and hasattr(error, "error_code"):
        return bool(error.error_code == _CUDA_MEMORY_ALLOCATION)
    # Others, Triton's for example, are plain RuntimeErrors that only their text tells apart.
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(each in text for each in _OUT_OF_MEMORY_TEXTS)
