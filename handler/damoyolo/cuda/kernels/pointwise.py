"""1x1 convolution with activation of several inputs, without writing their concatenation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from damoyolo.cuda.kernels import Activation, activate, runs_on_triton


def pointwise_conv(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    activation: Activation,
    upsampled: Sequence[bool] | None = None,
    out_channels: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Convolve the channels of up to five inputs, in their order, as if they were concatenated.

    inputs: (B, Ci, h, w) channels_last, or a range of channels of such a tensor; Ci multiples of 8.
    weight: (O, sum of Ci), contiguous. bias: (O,).
    upsampled: which inputs are (B, Ci, h/2, w/2) and repeated 2x2; none by default.
    out_channels: channels of one or two outputs, O together; one of O by default.

    Returns:
        (B, Oj, h, w) channels_last for each of `out_channels`; sums and activation are in float32 on CUDA.
    """
    upsampled = tuple(upsampled or (False,) * len(inputs))
    out_channels = tuple(out_channels or (weight.shape[0],))
    if runs_on_triton(inputs[0], inputs[0].dtype):
        from damoyolo.cuda.kernels.pointwise_triton import pointwise_conv as kernel

        return kernel(inputs, weight, bias, activation, upsampled, out_channels)
    return pointwise_conv_reference(inputs, weight, bias, activation, upsampled, out_channels)


def pointwise_conv_reference(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    activation: Activation,
    upsampled: Sequence[bool],
    out_channels: Sequence[int],
) -> tuple[Tensor, ...]:
    """The same in plain torch."""
    full = [
        F.interpolate(x, scale_factor=2.0, mode="nearest") if twice else x
        for x, twice in zip(inputs, upsampled, strict=True)
    ]
    concatenated = torch.cat(full, dim=1)  # B,Ci,h,w each -> B,sum of Ci,h,w
    y = activate(F.conv2d(concatenated, weight[:, :, None, None], bias), activation)  # -> B,O,h,w
    parts = torch.split(y, list(out_channels), dim=1)
    return tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)
