"""A convolution with bias, shortcut and activation as one call, and the blocks made of it."""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    """activation(convolution + bias), or activation(convolution + bias + addend).

    On CUDA, ReLU takes one call of cuDNN, another activation one pass over the convolution's output.
    """

    def __init__(self, conv: nn.Conv2d, activation: Activation) -> None:
        super().__init__()
        self.weight = frozen(conv.weight)
        self.bias = frozen(bias_of(conv))
        self.stride = conv.stride
        self.padding = conv.padding
        self.activation = activation

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        if not x.is_cuda:
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
            return activate(y if addend is None else y.add_(addend), self.activation)
        if self.activation != "relu":
            y = F.conv2d(x, self.weight, None, self.stride, self.padding)
            return add_bias_and_activate(y, self.bias, self.activation, addend)
        geometry = (self.stride, self.padding, (1, 1), 1)  # and dilation, groups
        if addend is None:
            return torch.ops.aten.cudnn_convolution_relu(x, self.weight, self.bias, *geometry)
        return torch.ops.aten.cudnn_convolution_add_relu(x, self.weight, addend, 1.0, self.bias, *geometry)


class FusedResidualBlock(nn.Module):
    """`ResidualBlock` of fused convolutions."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        activation = ACTIVATION_NAMES[type(block.act)]
        self.conv1 = FusedConv(block.conv1.conv1, activation)
        self.conv2 = FusedConv(cast(nn.Conv2d, block.conv2), activation)
        self.has_shortcut = block.has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), x if self.has_shortcut else None)


class FusedRepBlock(nn.Module):
    """`RepBlock` of fused convolutions; the sum follows an activation and stays a separate operation."""

    def __init__(self, block: RepBlock) -> None:
        super().__init__()
        self.conv1 = FusedConv(block.conv1.conv, ACTIVATION_NAMES[type(block.conv1.act)])
        self.conv2 = FusedConv(cast(nn.Conv2d, block.conv2), ACTIVATION_NAMES[type(block.act)])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv2(x)).add_(x)
