"""Add bias and shortcut to a convolution's output and activate it, in one pass."""

from __future__ import annotations

from torch import Tensor

from damoyolo.cuda.kernels import Activation, activate, runs_on_triton


def add_bias_and_activate(
    x: Tensor, bias: Tensor, activation: Activation, addend: Tensor | None = None
) -> Tensor:
    """activation(x + bias + addend); overwrites x where a kernel runs.

    torch adds a bias per channel with a kernel that reads single elements, at about a third of the memory
    bandwidth, and would activate in another pass.

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
