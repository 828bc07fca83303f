"""Convolution with its epilogue: the plain form against torch, the kernel against the plain form."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from damoyolo.cuda.kernels.conv import fused_conv_reference, runs_fused_conv


@dataclass(frozen=True)
class Case:
    in_type: torch.dtype = torch.float16
    out_type: torch.dtype = torch.float16
    in_channels: int = 64
    out_channels: int = 96
    kernel_size: int = 3
    stride: int = 1
    relu: bool = True
    addend: torch.dtype | None = None
    add_after: bool = False
    size_hw: tuple[int, int] = (20, 12)


CASES = [
    Case(),
    Case(addend=torch.float16),
    Case(addend=torch.float16, add_after=True),
    Case(stride=2, relu=False),
    Case(kernel_size=1, in_channels=128, out_channels=40),
    Case(in_type=torch.bfloat16, out_type=torch.bfloat16),
    Case(in_type=torch.int8, out_type=torch.int8),
    Case(in_type=torch.int8, out_type=torch.int8, addend=torch.int8, add_after=True),
    Case(in_type=torch.int8, out_type=torch.float16, addend=torch.float16),
    Case(in_type=torch.int8, out_type=torch.int8, stride=2, addend=torch.float16),
    Case(out_type=torch.int8),
    Case(size_hw=(8, 8)),  # boxes of several images, columns past the last
    Case(size_hw=(4, 4), out_channels=192),
    Case(size_hw=(4, 8), in_channels=32, in_type=torch.int8, out_type=torch.float16),
]


def make_tensors(case, batch):
    """x, weight, bias, scale (None for fp16), addend: sums of about one, or of about 40 steps of int8."""
    generator = torch.Generator().manual_seed(2)
    h, w = case.size_hw
    terms = case.in_channels * case.kernel_size**2
    size = 40.0 if case.out_type == torch.int8 else 1.0

    def draw(*shape, deviation=1.0):
        return torch.randn(shape, generator=generator) * deviation

    x = draw(batch, case.in_channels, h, w)
    weight = draw(case.out_channels, case.in_channels, case.kernel_size, case.kernel_size)
    scale = None
    if case.in_type == torch.int8:
        x, weight = ((each * 40).round().clamp(-127, 127) for each in (x, weight))
        scale = size / (1600 * terms**0.5) * (1 + draw(case.out_channels).abs())
    else:
        weight *= size * terms**-0.5
    addend = None
    if case.addend is not None:
        addend = draw(batch, case.out_channels, h // case.stride, w // case.stride, deviation=40.0)
        addend = addend.round().clamp(-127, 127).to(case.addend).to(memory_format=torch.channels_last)
    x, weight = (each.to(case.in_type).contiguous(memory_format=torch.channels_last) for each in (x, weight))
    return x, weight, draw(case.out_channels, deviation=size), scale, addend


def test_the_plain_form_is_convolution_addition_and_relu_of_torch():
    x, weight, bias, _, addend = make_tensors(Case(stride=2, addend=torch.float16), 2)
    conv = nn.Conv2d(64, 96, 3, 2, 1).requires_grad_(False)
    conv.weight.copy_(weight.float()), conv.bias.copy_(bias)
    before = torch.relu(conv(x.float()) + 0.5 * addend.float()).half()
    after = (torch.relu(conv(x.float())) + 0.5 * addend.float()).half()
    found = fused_conv_reference(x, weight, bias, 2, addend=addend, addend_factor=0.5)
    torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-3)  # steps of fp16
    found = fused_conv_reference(x, weight, bias, 2, addend=addend, addend_factor=0.5, add_after=True)
    torch.testing.assert_close(found, after, rtol=1e-3, atol=1e-3)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_int8_is_rounded_to_the_nearest_with_halves_up_and_saturated():
    x = torch.full((1, 1, 1, 1), 10, dtype=torch.int8)
    weight = torch.tensor([1, 100, -100, 3], dtype=torch.int8).view(4, 1, 1, 1)
    scale, bias = torch.full((4,), 0.25), torch.zeros(4)
    found = fused_conv_reference(x, weight, bias, relu=False, scale=scale)
    assert found.dtype == torch.int8
    assert found.flatten().tolist() == [3, 127, -128, 8]  # 2.5, 250, -250, 7.5


def test_a_cpu_has_no_kernel():
    assert not runs_fused_conv(torch.device("cpu"))


def tiles_for(case):
    from damoyolo.cuda.kernels.conv_gluon import Tile

    block_k = 64 if case.in_channels % 64 == 0 else 32
    return [Tile(128, 128, block_k, 4, 8), Tile(64, 64, 32, 3, 4, 128)]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not runs_fused_conv(torch.device("cuda")),
    reason="needs a CUDA device of compute capability 9.0",
)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_the_kernel_rounds_the_values_of_the_plain_form(case, rounding_bound):
    from damoyolo.cuda.kernels.conv_gluon import fused_conv

    x, weight, bias, scale, addend = make_tensors(case, 3)
    options = {"stride": case.stride, "relu": case.relu, "addend_factor": 0.5, "add_after": case.add_after}
    exact = exact_values(x, weight, bias, scale, addend, **options)
    ones = torch.ones_like(bias) if scale is None else scale
    magnitudes = exact_values(
        x.abs(), weight.abs(), bias.abs(), ones, None if addend is None else addend.abs(), **options
    )
    terms = case.in_channels * case.kernel_size**2 + 3  # and scale, bias, addition
    if case.out_type == torch.int8:
        # Rounding may fall to the other side of a half.
        bound = torch.ones_like(exact)
        exact = torch.floor(exact + 0.5).clamp(-128, 127)
    else:
        bound = rounding_bound(terms, magnitudes, exact, case.out_type)
    on_device = [None if each is None else each.cuda() for each in (x, weight, bias, scale, addend)]
    for tile in tiles_for(case):
        found = fused_conv(
            *on_device[:3],
            scale=on_device[3],
            addend=on_device[4],
            out_dtype=case.out_type,
            tile=tile,
            **options,
        )
        assert found.dtype == case.out_type
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert ((found.cpu().double() - exact).abs() <= bound).all()


def exact_values(x, weight, bias, scale, addend, stride, relu, addend_factor, add_after):
    """The plain form in float64, without rounding at the end."""
    y = nn.functional.conv2d(x.double(), weight.double(), None, stride, weight.shape[2] // 2)
    if scale is not None:
        y = y * scale.double()[:, None, None]
    y = y + bias.double()[:, None, None]
    added = 0.0 if addend is None else addend.double() * addend_factor
    if not add_after:
        y = y + added
    if relu:
        y = y.relu()
    return y + added if add_after else y


@pytest.mark.parametrize(
    ("pixels", "batch", "size_hw", "box"),
    [
        (128, 64, (80, 80), (1, 8, 16)),
        (128, 64, (40, 40), (2, 8, 8)),
        (128, 64, (20, 20), (8, 4, 4)),
        (128, 1, (20, 20), (1, 4, 32)),
        (64, 1, (160, 160), (1, 2, 32)),
    ],
)
def test_a_box_covers_the_output_with_few_pixels_to_spare(pixels, batch, size_hw, box):
    pytest.importorskip("triton.experimental.gluon")
    from damoyolo.cuda.kernels.conv_gluon import choose_box

    images, rows, columns = found = choose_box(pixels, batch, *size_hw)
    assert images * rows * columns == pixels

    def count(box):
        return -(-batch // box[0]) * -(-size_hw[0] // box[1]) * -(-size_hw[1] // box[2])

    assert count(found) <= count(box)
