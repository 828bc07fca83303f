"""The stem on raw pixels: the plain form against Focus, the kernel against the plain form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from damoyolo.cuda.kernels import Activation
from damoyolo.cuda.kernels.stem import focus_stem, focus_stem_reference

# The intermediate may round to the neighbouring value, then the second convolution sums about 5 such steps.
TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


def pixels(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    values = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    return values.to(memory_format=torch.channels_last)


def weights(
    stem_channels: int, point_channels: int | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of both convolutions, for results of about one."""
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int) -> Tensor:
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


def test_the_plain_form_is_focus_and_its_convolution() -> None:
    images = pixels(2, 12, 20)
    stem_weight, stem_bias, point_weight, point_bias = weights(16, 24)
    assert point_weight is not None
    # Focus: the four pixels of a cell become channels, of which the weight holds those of cell i, j.
    cells = F.pixel_unshuffle(images.float(), 2)  # B,3,H,W -> B,12,H/2,W/2
    cell_weight = F.pixel_unshuffle(stem_weight, 2)  # stem_channels,3,6,6 -> stem_channels,12,3,3
    hidden = F.relu(F.conv2d(cells, cell_weight, stem_bias, padding=1))
    expected = F.relu(F.conv2d(hidden, point_weight[:, :, None, None], point_bias))

    result = focus_stem(images, stem_weight, stem_bias, point_weight, point_bias, torch.float32)

    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", TOLERANCE)
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
    channels: tuple[int, int | None],
    activation: Activation,
    size_hw: tuple[int, int],
    dtype: torch.dtype,
    kernel_device: torch.device,
) -> None:
    from damoyolo.cuda.kernels import stem_triton

    if kernel_device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter does not multiply bfloat16")
    images = pixels(2, *size_hw)
    parameters = [None if x is None else x.to(dtype) for x in weights(*channels)]
    exact = focus_stem_reference(
        images, *(None if x is None else x.float() for x in parameters), torch.float32, activation
    )
    result = stem_triton.focus_stem(
        images.to(kernel_device),
        *(None if x is None else x.to(kernel_device) for x in parameters),
        dtype,
        activation,
    )
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.cpu().float(), exact, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_the_kernel_takes_pixels_and_weights_in_any_layout(kernel_device: torch.device) -> None:
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
