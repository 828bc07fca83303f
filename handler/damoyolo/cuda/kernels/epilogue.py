"""What follows a convolution that cuDNN cannot fuse with it: bias, shortcut and activation, in one pass."""

from __future__ import annotations

from torch import Tensor

from damoyolo.cuda.kernels import Activation, activate, runs_on_triton


def add_bias_and_activate(
    x: Tensor, bias: Tensor, activation: Activation, addend: Tensor | None = None
) -> Tensor:
    """activation(x + bias + addend), written over x where a kernel runs.

    torch adds a bias to each pixel's channels with a kernel that reads single elements, at about a third of
    the memory's rate, and the activation would be a pass of its own.

    x, addend: (B, C, h, w) channels_last. bias: (C,).
    """
    if runs_on_triton(x, x.dtype):
        from damoyolo.cuda.kernels import epilogue_triton

        return epilogue_triton.add_bias_and_activate(x, bias, activation, addend)
    return add_bias_and_activate_reference(x, bias, activation, addend)


def add_bias_and_activate_reference(
    x: Tensor, bias: Tensor, activation: Activation, addend: Tensor | None = None
) -> Tensor:
    """The same in plain torch."""
    y = x + bias[:, None, None]
    return activate(y if addend is None else y + addend, activation)
