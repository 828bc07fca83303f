"""Bias, shortcut and activation after a convolution: the plain form, and the kernel against it."""

import pytest
import torch
from torch import nn

from damoyolo.cuda.kernels.epilogue import add_bias_and_activate, add_bias_and_activate_reference


def features(shape, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last)


def test_the_plain_form_is_what_a_convolution_with_bias_shortcut_and_activation_gives():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1).double().requires_grad_(False)
    x = features((2, 8, 5, 7), 1).double()
    assert conv.bias is not None
    without_bias = conv(x) - conv.bias[:, None, None]
    found = add_bias_and_activate(without_bias, conv.bias, "silu", x)
    torch.testing.assert_close(found, nn.SiLU()(conv(x) + x), rtol=0, atol=1e-10)


# 72 channels: the stretches of programs start anywhere in a pixel; 2048 elements: they end with the tensor.
@pytest.mark.parametrize("shape", [(2, 72, 9, 11), (1, 71, 3, 5), (2, 64, 4, 4), (3, 8, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "silu", "none"])
@pytest.mark.parametrize("with_addend", [False, True])
def test_the_kernel_agrees_with_the_plain_form(shape, dtype, activation, with_addend, kernel_device):
    from damoyolo.cuda.kernels import epilogue_triton

    x = features(shape, 1).to(dtype)
    bias = features((1, shape[1], 1, 1), 2).flatten().to(dtype)
    addend = features(shape, 3).to(dtype) if with_addend else None
    exact = add_bias_and_activate_reference(
        x.float(), bias.float(), activation, None if addend is None else addend.float()
    )
    on_device = None if addend is None else addend.to(kernel_device)
    found = epilogue_triton.add_bias_and_activate(
        x.to(kernel_device), bias.to(kernel_device), activation, on_device
    )
    assert found.dtype == dtype
    # Rounded once, by at most eps / 2 of the value; the additions in float32 before are 1000 times finer.
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(found.cpu().float(), exact, rtol=tolerance, atol=tolerance)


def test_an_addend_of_another_shape_is_refused(kernel_device):
    from damoyolo.cuda.kernels import epilogue_triton

    x, bias = torch.zeros(1, 8, 4, 4, device=kernel_device), torch.zeros(8, device=kernel_device)
    with pytest.raises(ValueError, match=r"addend is \(1, 8, 4, 1\).*expected is \(1, 8, 4, 4\)"):
        epilogue_triton.add_bias_and_activate(x, bias, "none", x[..., :1])
