"""Convolution with scale, bias, addition and ReLU in one pass, in fp16 and in INT8."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F


@functools.cache
def runs_fused_conv(device: torch.device) -> bool:
    """Whether `fused_conv` has a kernel here: on chips of compute capability 9.0 (H100, H200), in Gluon."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and importlib.util.find_spec("triton") is not None
        and importlib.util.find_spec("triton.experimental.gluon") is not None
    )


def fused_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    relu: bool = True,
    scale: Tensor | None = None,
    addend: Tensor | None = None,
    addend_factor: float = 1.0,
    add_after: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What `conv_gluon.fused_conv` computes, in float32 of plain torch.

    relu(convolution * scale + bias + addend * addend_factor), or the addition after the ReLU.

    x: (B, C, H, W) channels_last, in fp16, bf16, or int8, whose products are summed in int32.
    weight: (O, C, k, k) channels_last, of the type of x, k 1 or 3; padded to keep the size at stride 1.
    bias, scale: (O,). addend: (B, O, H', W') channels_last.
    out_dtype: that of x by default; int8 is rounded to the nearest (halves up) and saturated.

    Returns:
        (B, O, H', W') channels_last.
    """
    out_dtype = out_dtype or x.dtype
    y = F.conv2d(x.float(), weight.float(), None, stride, weight.shape[2] // 2)
    if scale is not None:
        y = y * scale.float()[:, None, None]
    y = y + bias.float()[:, None, None]
    added = None if addend is None else addend.float() * addend_factor
    if added is not None and not add_after:
        y = y + added
    if relu:
        y = F.relu(y)
    if added is not None and add_after:
        y = y + added
    if out_dtype == torch.int8:
        y = torch.floor(y + 0.5).clamp(-128, 127)
    return y.to(out_dtype).contiguous(memory_format=torch.channels_last)
