"""1x1 convolutions without concatenation: the plain form against torch, the kernel against the plain form."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from damoyolo.cuda.kernels import Activation
from damoyolo.cuda.kernels.pointwise import pointwise_conv, pointwise_conv_reference

# Of two computations in float64 of sums of a few hundred products of about one: far above their rounding.
CLOSE_IN_FLOAT64 = {"rtol": 0.0, "atol": 1e-10}


@dataclass(frozen=True)
class Case:
    channels: tuple[int, ...]
    upsampled: tuple[bool, ...]
    out_channels: tuple[int, ...]
    activation: Activation
    size_hw: tuple[int, int] = (6, 10)


CASES = [
    Case((64,), (False,), (40,), "none"),
    Case((64, 64, 64, 64), (False,) * 4, (128,), "relu"),
    Case((64, 128), (False, True), (64, 64), "relu"),
    Case((128, 64, 192), (False, False, True), (32, 32), "silu"),
    # Channels that no block divides, outputs of unlike sizes, every input upsampled that can be.
    Case((24, 88, 40, 8, 72), (False, True, True, False, True), (24, 56), "silu"),
    Case((88,), (False,), (24,), "relu", (1, 1)),
    Case((16, 16), (True, False), (16, 8), "none", (2, 34)),
]


def random_tensor(shape, seed):
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def make_inputs(case, batch):
    """Float32 channels_last tensors; every second is a range of the channels of a wider one."""
    inputs = []
    for i, (channels, twice) in enumerate(zip(case.channels, case.upsampled, strict=True)):
        h, w = (side // 2 for side in case.size_hw) if twice else case.size_hw
        margin = 8 * (i % 2)
        wide = random_tensor((batch, channels + 2 * margin, h, w), i).to(memory_format=torch.channels_last)
        inputs.append(wide[:, margin : margin + channels])
    return inputs


def make_weights(case):
    """(O, sum C) for sums of about one, and (O,)."""
    shape = (sum(case.out_channels), sum(case.channels))
    return random_tensor(shape, 7) * shape[1] ** -0.5, random_tensor(shape[:1], 8)


def test_the_plain_form_is_torch_on_the_concatenation():
    case = CASES[3]
    first, second, half = (x.double() for x in make_inputs(case, 2))
    weight, bias = (x.double() for x in make_weights(case))
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    conv.weight.data, conv.bias.data = weight[:, :, None, None], bias
    expected = nn.SiLU()(conv(torch.cat([first, second, nn.Upsample(scale_factor=2)(half)], dim=1)))

    outputs = pointwise_conv([first, second, half], weight, bias, "silu", case.upsampled, case.out_channels)

    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, **CLOSE_IN_FLOAT64)
    assert [y.shape[1] for y in outputs] == [32, 32]
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)


def test_one_full_size_input_and_one_output_are_the_default():
    x = random_tensor((1, 8, 3, 5), 0).double()
    weight, bias = random_tensor((16, 8), 1).double(), random_tensor((16,), 2).double()
    outputs = pointwise_conv([x], weight, bias, "none")
    expected = torch.einsum("bchw,oc->bohw", x, weight) + bias[:, None, None]
    torch.testing.assert_close(outputs, (expected,), **CLOSE_IN_FLOAT64)


def assert_rounded_exact_values(case, batch, dtype, device, tile, rounding_bound):
    """The kernel against the plain form in float64, within the rounding of its own arithmetic."""
    from damoyolo.cuda.kernels import pointwise_triton

    inputs = [x.to(dtype) for x in make_inputs(case, batch)]
    weight, bias = (x.to(dtype) for x in make_weights(case))
    exact = pointwise_conv_reference(
        [x.double() for x in inputs],
        weight.double(),
        bias.double(),
        case.activation,
        case.upsampled,
        case.out_channels,
    )
    magnitudes = pointwise_conv_reference(
        [x.double().abs() for x in inputs],
        weight.double().abs(),
        bias.double().abs(),
        "none",
        case.upsampled,
        case.out_channels,
    )
    outputs = pointwise_triton.pointwise_conv(
        [x.to(device) for x in inputs],
        weight.to(device),
        bias.to(device),
        case.activation,
        case.upsampled,
        case.out_channels,
        tile,
    )
    for output, values, sums in zip(outputs, exact, magnitudes, strict=True):
        assert output.dtype == dtype
        assert output.is_contiguous(memory_format=torch.channels_last)
        bound = rounding_bound(weight.shape[1], sums, values, dtype)
        assert ((output.cpu().double() - values).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_rounds_the_values_of_the_plain_form(case, dtype, kernel_device, rounding_bound):
    if kernel_device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter does not multiply bfloat16")
    assert_rounded_exact_values(case, 3, dtype, kernel_device, None, rounding_bound)


@pytest.mark.parametrize("tile", ["of few rows", "of many rows", "small"])
def test_every_tile_gives_the_same_result(tile, kernel_device, rounding_bound):
    from damoyolo.cuda.kernels.pointwise_triton import Tile, choose_tile

    tiles = {
        "of few rows": choose_tile(120, 64),
        "of many rows": choose_tile(32 * 80 * 80, 256),
        "small": Tile(64, 16, 32, 4, 4),
    }
    assert_rounded_exact_values(CASES[3], 2, torch.float16, kernel_device, tiles[tile], rounding_bound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_call_reads_its_inputs_again():
    case = CASES[2]
    inputs = [x.to("cuda", torch.float16) for x in make_inputs(case, 2)]
    weight, bias = (x.to("cuda", torch.float16) for x in make_weights(case))

    def call():
        return pointwise_conv(inputs, weight, bias, case.activation, case.upsampled, case.out_channels)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for x in inputs:
        x.neg_()
    graph.replay()
    torch.testing.assert_close(captured, call(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("inputs", "weight", "message"),
    [
        ([torch.zeros(1, 12, 2, 2)], torch.zeros(8, 12), "channels in eights"),
        ([torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 1, 1)], torch.zeros(8, 16), "expected is a batch of 1"),
        ([torch.zeros(1, 8, 2, 2)], torch.zeros(8, 16), r"weight is \(8, 16\)"),
        ([torch.zeros(1, 8, 2, 2)], torch.zeros(8, 8), "are not those of channels_last pixels"),
        ([torch.zeros(1, 8, 2, 2)] * 6, torch.zeros(8, 48), "6 inputs"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(inputs, weight, message):
    pytest.importorskip("triton")
    from damoyolo.cuda.kernels import pointwise_triton

    with pytest.raises(ValueError, match=message):
        pointwise_triton.pointwise_conv(
            inputs, weight, torch.zeros(8), "relu", [False] * len(inputs), [weight.shape[0]]
        )
