"""Spatial pyramid pooling: write the maxima straight into the tensor that the next convolution reads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from damoyolo.cuda.kernels import runs_on_triton


def pyramid_max_pool(x: Tensor) -> Tensor:
    """(B, C, h, w) channels_last -> (B, 4C, h, w) channels_last: x, then its maxima over 5x5, 9x9 and 13x13.

    Windows are clipped at the borders.
    """
    if runs_on_triton(x, x.dtype):
        from damoyolo.cuda.kernels.pooling_triton import pyramid_max_pool as kernel

        return kernel(x)
    return pyramid_max_pool_reference(x)


def pyramid_max_pool_reference(x: Tensor) -> Tensor:
    """The same in plain torch."""
    over_5x5 = F.max_pool2d(x, 5, stride=1, padding=2)
    over_9x9 = F.max_pool2d(over_5x5, 5, stride=1, padding=2)  # a maximum of maxima is the wider window
    over_13x13 = F.max_pool2d(over_9x9, 5, stride=1, padding=2)
    pyramid = torch.cat([x, over_5x5, over_9x9, over_13x13], dim=1)  # -> B,4C,h,w
    return pyramid.contiguous(memory_format=torch.channels_last)
