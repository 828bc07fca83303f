"""The stem on raw pixels: the plain form against Focus, the kernel against the plain form."""

import pytest
import torch
from torch.nn import functional as F

from damoyolo.cuda.kernels import activate
from damoyolo.cuda.kernels.stem import focus_stem, focus_stem_reference


def pixels(batch, height, width):
    generator = torch.Generator().manual_seed(6)
    values = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    return values.to(memory_format=torch.channels_last)


def weights(stem_channels, point_channels):
    """Of both convolutions, for results of about one."""
    generator = torch.Generator().manual_seed(9)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    stem = (
        draw(stem_channels, 3, 6, 6).to(memory_format=torch.channels_last) / (150 * 108**0.5),
        draw(stem_channels),
    )
    return (
        (*stem, None, None)
        if point_channels is None
        else (*stem, draw(point_channels, stem_channels) / stem_channels**0.5, draw(point_channels))
    )


def test_the_plain_form_is_focus_and_its_convolution():
    images = pixels(2, 12, 20)
    stem_weight, stem_bias, point_weight, point_bias = (
        None if x is None else x.double() for x in weights(16, 24)
    )
    assert stem_weight is not None
    assert stem_bias is not None
    assert point_weight is not None
    # Focus: the four pixels of a cell become channels, of which the weight holds those of cell i, j.
    cells = F.pixel_unshuffle(images.double(), 2)  # B,3,H,W -> B,12,H/2,W/2
    cell_weight = F.pixel_unshuffle(stem_weight, 2)  # stem_channels,3,6,6 -> stem_channels,12,3,3
    hidden = F.relu(F.conv2d(cells, cell_weight, stem_bias, padding=1))
    expected = F.relu(F.conv2d(hidden, point_weight[:, :, None, None], point_bias))

    result = focus_stem(images, stem_weight, stem_bias, point_weight, point_bias, torch.float64)

    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)  # far above the rounding of float64
    assert result.is_contiguous(memory_format=torch.channels_last)


def exact_values_and_bound(images, parameters, activation, dtype, rounding_bound):
    """The plain form in float64, and how far the kernel may be from it."""
    stem_weight, stem_bias, point_weight, point_bias = (None if x is None else x.double() for x in parameters)
    assert stem_weight is not None
    assert stem_bias is not None

    def stem(weight, bias, activation):
        return focus_stem_reference(images, weight, bias, None, None, torch.float64, activation)

    hidden = stem(stem_weight, stem_bias, activation)
    magnitudes = stem(stem_weight.abs(), stem_bias.abs(), "none")
    if dtype == torch.float16:
        # A byte enters as 1024 + byte, and the bias is lowered by 1024 times the sum of the weights.
        magnitudes = magnitudes + 2 * 1024 * stem_weight.abs().sum(dim=(1, 2, 3))[:, None, None]
    # A patch is read as 6 rows of 20 bytes, of which 2 are weighted by zero; as many weights are summed.
    bound = rounding_bound(2 * 6 * 20, magnitudes, hidden, dtype)
    if point_weight is None or point_bias is None:
        return hidden, bound
    kernel = point_weight[:, :, None, None]
    exact = activate(F.conv2d(hidden, kernel, point_bias), activation)
    # The first result is rounded to `dtype`. What it is off goes through the second convolution.
    magnitudes = F.conv2d(hidden.abs() + bound, kernel.abs(), point_bias.abs())
    own = rounding_bound(point_weight.shape[1], magnitudes, exact, dtype)
    inherited = 1.1 * F.conv2d(bound, kernel.abs())  # 1.1: the steepest activation
    return exact, own + inherited * (1 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("many_programs", [1, 10**6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "activation", "size_hw"),
    [
        ((32, 24), "relu", (32, 64)),
        ((24, 24), "relu", (22, 136)),  # incomplete blocks on both sides
        ((16, 144), "silu", (6, 4)),
        ((32, None), "silu", (6, 32)),
    ],
)
def test_the_kernel_agrees_with_the_plain_form(
    channels, activation, size_hw, dtype, many_programs, kernel_device, rounding_bound, monkeypatch
):
    from damoyolo.cuda.kernels import stem_triton

    monkeypatch.setattr(stem_triton, "MANY_PROGRAMS", many_programs)
    if kernel_device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter does not multiply bfloat16")
    images = pixels(2, *size_hw)
    parameters = [None if x is None else x.to(dtype) for x in weights(*channels)]
    exact, bound = exact_values_and_bound(images, parameters, activation, dtype, rounding_bound)
    result = stem_triton.focus_stem(
        images.to(kernel_device),
        *(None if x is None else x.to(kernel_device) for x in parameters),
        dtype,
        activation,
    )
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert ((result.cpu().double() - exact).abs() <= bound).all()


def test_the_kernel_takes_pixels_and_weights_in_any_layout(kernel_device):
    from damoyolo.cuda.kernels import stem_triton

    images = pixels(1, 8, 12).to(kernel_device)
    parameters = [None if x is None else x.to(kernel_device) for x in weights(16, 16)]
    stem_weight, *rest = parameters
    assert stem_weight is not None
    results = [
        stem_triton.focus_stem(x, weight, *rest, torch.float16)
        for x, weight in ((images, stem_weight), (images.contiguous(), stem_weight.contiguous()))
    ]
    assert torch.equal(*results)
