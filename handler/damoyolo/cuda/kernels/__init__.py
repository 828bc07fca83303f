"""Triton kernels for what is slow in cuDNN, each with the plain torch implementation that defines its result.

Every operation looks at its tensors: 16-bit ones on a CUDA device go to the kernel, all others (and all of
them if Triton is not installed) to plain torch. Triton is imported at the first call that needs it, so a CPU
server never pays for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["relu", "silu", "none"]


@functools.cache
def triton_is_installed() -> bool:
    """Whether kernels can be compiled here; finds the package without importing it."""
    return importlib.util.find_spec("triton") is not None


def runs_on_triton(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel computing in `dtype` takes this tensor."""
    return tensor.is_cuda and dtype in (torch.float16, torch.bfloat16) and triton_is_installed()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a Triton kernel on the device of its tensors; every launch goes through here.

    Triton itself launches on the current device, whatever the device of the tensors.

    kernel: a function of `triton.jit`. arguments, constants: passed on to it.

    Raises:
        ValueError: the tensors are on several devices, or there are none.
    """
    devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "none"
        raise ValueError(f"the tensors of a kernel are on {found}; one device is needed")
    (device,) = devices
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation as torch computes it."""
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return x


def pixel_stride(x: Tensor) -> int:
    """Elements from one pixel to the next in a (B, C, h, w) tensor whose memory is a list of B*h*w pixels.

    A slice of the channels of a channels_last tensor qualifies; its pixels are more than C elements apart.

    Raises:
        ValueError: the memory has another layout.
    """
    B, C, h, w = x.shape
    stride = next((x.stride(d) // n for d, s, n in ((3, w, 1), (2, h, w), (0, B, h * w)) if s > 1), C)
    expected = (h * w * stride, 1, w * stride, stride)
    if any(size > 1 and x.stride(d) != expected[d] for d, size in enumerate(x.shape)):
        raise ValueError(
            f"strides {x.stride()} of shape {tuple(x.shape)} are not those of channels_last pixels"
        )
    return stride
