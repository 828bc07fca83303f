"""When a convolution is timed, and that what was chosen runs from then on."""

import pytest
import torch

from damoyolo.cuda import conv_choice
from damoyolo.cuda.conv_choice import fastest_conv
from damoyolo.cuda.kernels.conv import fused_conv_reference, runs_fused_conv


@pytest.fixture
def kernel_everywhere(monkeypatch):
    """Pretend that this device has the kernel; the calls that were timed."""
    timed = []

    def choose_tile(calls):
        timed.append(sorted(calls))
        return "tile"

    monkeypatch.setattr(conv_choice, "runs_fused_conv", lambda _device: True)
    monkeypatch.setattr(conv_choice, "_kernel_calls", lambda *_: {"tile": lambda: "kernel"})
    monkeypatch.setattr(conv_choice, "_fastest", choose_tile)
    monkeypatch.setattr(conv_choice, "choices", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return timed


def convolve(dtype=torch.float16, size=4):
    x, weight = torch.zeros(1, 32, size, size, dtype=dtype), torch.zeros(32, 32, 3, 3, dtype=dtype)
    return fastest_conv(x, weight, torch.zeros(32), 1, True, None, False, lambda: "cudnn")


def test_without_the_kernel_cudnn_runs(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert convolve() == "cudnn"


def test_nothing_is_timed_outside_of_a_warm_up(kernel_everywhere, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert convolve() == "cudnn"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert convolve() == "cudnn"
    assert not kernel_everywhere


def test_each_shape_is_timed_once_and_the_choice_holds_afterwards(kernel_everywhere, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert convolve() == convolve() == "kernel"
    assert kernel_everywhere == [["cudnn", "tile"]]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert convolve() == "kernel"
    assert convolve(size=6) == "cudnn"
    monkeypatch.setattr(conv_choice, "_fastest", lambda _calls: "cudnn")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert convolve(size=6) == "cudnn"


def test_float32_always_takes_cudnn(kernel_everywhere, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert convolve(torch.float32) == "cudnn"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not runs_fused_conv(torch.device("cuda")),
    reason="needs a CUDA device of compute capability 9.0",
)
@pytest.mark.parametrize("add_after", [False, True])
@torch.inference_mode()
def test_every_way_to_run_a_convolution_gives_the_same(add_after, monkeypatch):
    torch.manual_seed(0)
    x, addend = (
        torch.randn(2, channels, 16, 24, device="cuda", dtype=torch.float16).to(
            memory_format=torch.channels_last
        )
        for channels in (64, 96)
    )
    weight = (torch.randn(96, 64, 3, 3, device="cuda") / 24).half().to(memory_format=torch.channels_last)
    bias = torch.randn(96, device="cuda").half()
    expected = fused_conv_reference(x, weight, bias, addend=addend, add_after=add_after).float()
    monkeypatch.setattr(conv_choice, "choices", {})
    ran = []

    def check_all(calls):
        for name, call in calls.items():
            ran.append(name)
            # fp16 rounds a result of up to about 8 to steps of 2**-8; cuDNN rounds twice where it adds after.
            torch.testing.assert_close(call().float(), expected, rtol=2e-3, atol=2e-3)
        return "cudnn"

    monkeypatch.setattr(conv_choice, "_fastest", check_all)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    fastest_conv(
        x,
        weight,
        bias,
        1,
        True,
        addend,
        add_after,
        lambda: fused_conv_reference(x, weight, bias, addend=addend, add_after=add_after),
    )
    assert len(ran) >= 4
