"""A convolution with bias, shortcut and activation as one call, and the blocks made of it."""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from damoyolo.cuda.conv_choice import fastest_conv
from damoyolo.cuda.kernels import Activation, activate
from damoyolo.cuda.kernels.epilogue import add_bias_and_activate
from damoyolo.model.layers import ResidualBlock
from damoyolo.model.neck import RepBlock

ACTIVATION_NAMES: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.SiLU: "silu"}


def frozen(tensor: Tensor) -> nn.Parameter:
    """A copy of a weight that moves with `.to`, is laid out for channels_last and is not trained."""
    memory_format = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return nn.Parameter(tensor.detach().clone(memory_format=memory_format), requires_grad=False)


def bias_of(conv: nn.Conv2d) -> Tensor:
    """The bias of a convolution; in a folded network every convolution has one."""
    assert conv.bias is not None
    return conv.bias


class FusedConv(nn.Module):
    """activation(convolution + bias), with an addition before or after the activation.

    On CUDA, ReLU takes one call of cuDNN, another activation one pass over the convolution's output.

    own_kernel: run the kernel of `kernels.conv` instead where that is faster (`conv_choice`).
    """

    def __init__(self, conv: nn.Conv2d, activation: Activation, own_kernel: bool = False) -> None:
        super().__init__()
        self.weight = frozen(conv.weight)
        self.bias = frozen(bias_of(conv))
        self.stride = conv.stride
        self.padding = conv.padding
        self.activation = activation
        self.own_kernel = own_kernel

    def forward(self, x: Tensor, addend: Tensor | None = None, added_after: Tensor | None = None) -> Tensor:
        """addend: added before the activation. added_after: added to its result; only one of the two."""
        if not x.is_cuda:
            return self._plain(x, addend, added_after)
        if not self.own_kernel or self.activation == "silu":
            return self._cudnn(x, addend, added_after)
        return fastest_conv(
            x,
            self.weight,
            self.bias,
            self.stride[0],
            self.activation == "relu",
            addend if added_after is None else added_after,
            added_after is not None,
            functools.partial(self._cudnn, x, addend, added_after),
        )

    def _plain(self, x: Tensor, addend: Tensor | None, added_after: Tensor | None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        y = activate(y if addend is None else y.add_(addend), self.activation)
        return y if added_after is None else y.add_(added_after)

    def _cudnn(self, x: Tensor, addend: Tensor | None, added_after: Tensor | None) -> Tensor:
        if self.activation != "relu":
            y = F.conv2d(x, self.weight, None, self.stride, self.padding)
            y = add_bias_and_activate(y, self.bias, self.activation, addend)
        else:
            geometry = (self.stride, self.padding, (1, 1), 1)  # and dilation, groups
            ops = torch.ops.aten
            if addend is None:
                y = ops.cudnn_convolution_relu(x, self.weight, self.bias, *geometry)
            else:
                y = ops.cudnn_convolution_add_relu(x, self.weight, addend, 1.0, self.bias, *geometry)
        return y if added_after is None else y.add_(added_after)


class FusedResidualBlock(nn.Module):
    """`ResidualBlock` of fused convolutions."""

    def __init__(self, block: ResidualBlock, own_kernel: bool = False) -> None:
        super().__init__()
        activation = ACTIVATION_NAMES[type(block.act)]
        self.conv1 = FusedConv(block.conv1.conv1, activation, own_kernel)
        self.conv2 = FusedConv(cast(nn.Conv2d, block.conv2), activation, own_kernel)
        self.has_shortcut = block.has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), x if self.has_shortcut else None)


class FusedRepBlock(nn.Module):
    """`RepBlock` of fused convolutions; its sum follows an activation."""

    def __init__(self, block: RepBlock, own_kernel: bool = False) -> None:
        super().__init__()
        self.conv1 = FusedConv(block.conv1.conv, ACTIVATION_NAMES[type(block.conv1.act)], own_kernel)
        self.conv2 = FusedConv(cast(nn.Conv2d, block.conv2), ACTIVATION_NAMES[type(block.act)], own_kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv2(x), added_after=x)
