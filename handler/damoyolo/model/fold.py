"""Fold a trained state dict into that of plain convolutions with bias; pure functions, computed in float64.

Linear operations around a convolution become part of it: BatchNorm, the sum of RepConv's two branches, and
the learned scale of the distance logits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from damoyolo.model.layers import BATCH_NORM_EPS

StateDict = Mapping[str, Tensor]

# The convolution before a BatchNorm, by name; in numbered layers it has the number before.
_CONV_OF_NORM = {"bn": "conv", "bn1": "conv1", "dwnorm": "depthwise", "pwnorm": "pointwise"}


def fold_state_dict(state_dict: StateDict) -> dict[str, Tensor]:
    """The state dict of `build_model(..., folded=True)` for a state dict of the form as trained.

    Returns:
        New contiguous float32 tensors; the input is not changed.
    """
    exact = {name: tensor.detach().to(torch.float64) for name, tensor in state_dict.items()}
    folded = fold_scales(fold_rep_convs(fold_batch_norms(exact)))
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in folded.items()}


def fold_batch_norms(state_dict: StateDict) -> dict[str, Tensor]:
    """Every BatchNorm becomes part of the convolution before it, which gets a bias."""
    norm_suffix = ".running_var"
    norms = [name.removesuffix(norm_suffix) for name in state_dict if name.endswith(norm_suffix)]
    norm_of_conv = {_conv_before(norm): norm for norm in norms}
    absorbed = set(norms)
    folded: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        layer = name.rpartition(".")[0]
        if layer in norm_of_conv:
            norm = norm_of_conv[layer]
            factor = state_dict[f"{norm}.weight"] / torch.sqrt(
                state_dict[f"{norm}.running_var"] + BATCH_NORM_EPS
            )
            folded[f"{layer}.weight"] = tensor * factor[:, None, None, None]
            folded[f"{layer}.bias"] = state_dict[f"{norm}.bias"] - state_dict[f"{norm}.running_mean"] * factor
        elif layer not in absorbed:
            folded[name] = tensor
    return folded


def fold_rep_convs(state_dict: StateDict) -> dict[str, Tensor]:
    """The two branches of every RepConv, BatchNorm already folded, become one 3x3 convolution."""
    folded: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        rep_conv, is_dense, parameter = name.partition(".rbr_dense.conv.")
        if is_dense:
            branch_1x1 = state_dict[f"{rep_conv}.rbr_1x1.conv.{parameter}"]
            if parameter == "weight":
                branch_1x1 = F.pad(branch_1x1, (1, 1, 1, 1))  # O,I,1,1 -> O,I,3,3, in the centre
            folded[f"{rep_conv}.{parameter}"] = tensor + branch_1x1
        elif ".rbr_1x1." not in name:
            folded[name] = tensor
    return folded


def fold_scales(state_dict: StateDict) -> dict[str, Tensor]:
    """The learned scale of a level becomes part of its distance convolution, bias included."""
    folded: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name.startswith("head.gfl_reg."):
            level = name.split(".")[2]
            folded[name] = tensor * state_dict[f"head.scales.{level}.scale"]
        elif not name.startswith("head.scales."):
            folded[name] = tensor
    return folded


def _conv_before(norm: str) -> str:
    parent, _, leaf = norm.rpartition(".")
    return f"{parent}.{_CONV_OF_NORM.get(leaf) or int(leaf) - 1}"
