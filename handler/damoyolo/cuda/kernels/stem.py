"""The stem on raw pixels: Focus, its convolution and the 1x1 convolution that follows, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from damoyolo.cuda.kernels import Activation, activate, runs_on_triton


def focus_stem(
    pixels: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor,
    point_weight: Tensor | None,
    point_bias: Tensor | None,
    dtype: torch.dtype,
    activation: Activation = "relu",
) -> Tensor:
    """A 6x6 convolution of stride 2 and padding 2, and optionally a 1x1 convolution after it.

    pixels: (B, 3, H, W) uint8, channels_last; H and W even.
    stem_weight: (C1, 3, 6, 6), for pixels 0..255; not copied where it is channels_last. stem_bias: (C1,).
    point_weight: (C2, C1), or None to omit the second convolution. point_bias: (C2,).
    dtype: of the arithmetic and of the result; weights of this type are not converted.
    activation: after each of the two.

    Returns:
        (B, C2, H/2, W/2) channels_last; (B, C1, H/2, W/2) without the second convolution.
    """
    if runs_on_triton(pixels, dtype):
        from damoyolo.cuda.kernels.stem_triton import focus_stem as kernel
    else:
        kernel = focus_stem_reference
    return kernel(pixels, stem_weight, stem_bias, point_weight, point_bias, dtype, activation)


def focus_stem_reference(
    pixels: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor,
    point_weight: Tensor | None,
    point_bias: Tensor | None,
    dtype: torch.dtype,
    activation: Activation = "relu",
) -> Tensor:
    """The same in plain torch."""
    images = pixels.to(dtype, memory_format=torch.channels_last)
    x = F.conv2d(images, stem_weight.to(dtype), stem_bias.to(dtype), stride=2, padding=2)  # -> B,C1,H/2,W/2
    x = activate(x, activation)
    if point_weight is not None:
        assert point_bias is not None
        x = F.conv2d(x, point_weight.to(dtype)[:, :, None, None], point_bias.to(dtype))  # -> B,C2,H/2,W/2
        x = activate(x, activation)
    return x.contiguous(memory_format=torch.channels_last)
