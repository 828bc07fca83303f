"""Pyramid pooling: the plain form against its definition, the kernels against the plain form."""

import pytest
import torch
from torch.nn import functional as F

from damoyolo.cuda.kernels.pooling import pyramid_max_pool, pyramid_max_pool_reference


def features(shape):
    """Channels_last, negative so that a border counted as zero would show."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)) - 10
    return x.to(memory_format=torch.channels_last)


def test_the_plain_form_is_the_maxima_of_its_windows():
    x = features((2, 8, 7, 20))
    windows = [F.max_pool2d(x, size, stride=1, padding=size // 2) for size in (5, 9, 13)]
    pyramid = pyramid_max_pool(x)
    assert torch.equal(pyramid, torch.cat([x, *windows], dim=1))
    assert pyramid.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 80, 5, 20), (1, 64, 15, 14), (3, 8, 1, 1)])
def test_the_kernels_equal_the_plain_form(shape, dtype, kernel_device):
    from damoyolo.cuda.kernels import pooling_triton

    x = features(shape).to(dtype)
    pyramid = pooling_triton.pyramid_max_pool(x.to(kernel_device))
    assert torch.equal(pyramid.cpu(), pyramid_max_pool_reference(x))
    assert pyramid.is_contiguous(memory_format=torch.channels_last)


def test_the_kernels_read_a_range_of_channels(kernel_device):
    from damoyolo.cuda.kernels import pooling_triton

    x = features((2, 32, 6, 9)).half()[:, 8:24]
    pyramid = pooling_triton.pyramid_max_pool(x.to(kernel_device))
    assert torch.equal(pyramid.cpu(), pyramid_max_pool_reference(x))


def test_the_kernels_pass_on_what_is_not_a_number(kernel_device):
    from damoyolo.cuda.kernels import pooling_triton

    x = features((1, 8, 9, 16)).half()
    x[0, 3, 4, 5] = torch.nan
    pyramid = pooling_triton.pyramid_max_pool(x.to(kernel_device)).cpu()
    torch.testing.assert_close(pyramid, pyramid_max_pool_reference(x), rtol=0, atol=0, equal_nan=True)
