"""Every kernel is launched on the device of its tensors, whatever the current device; needs no device."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from damoyolo.cuda.kernels import launch
from damoyolo.cuda.kernels.epilogue import add_bias_and_activate
from damoyolo.cuda.kernels.pointwise import pointwise_conv
from damoyolo.cuda.kernels.pooling import pyramid_max_pool
from damoyolo.cuda.kernels.resize import resize_images
from damoyolo.cuda.kernels.stem import focus_stem
from damoyolo.orientation import OrientedImage
from damoyolo.structures import RawPredictions

HANDLER_DIR = Path(__file__).parents[5] / "handler"
DEVICE = torch.device("cuda:1")


@pytest.fixture(autouse=True)
def _no_device_is_used(monkeypatch):
    # It allocates on the device of a fake tensor, which a machine with one GPU does not have.
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda _device: None)


def half(*shape):
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(*shape, dtype=torch.float16, device=DEVICE).to(memory_format=memory_format)


def call_resize(monkeypatch):
    # Neither pinned memory nor an address exists without a device.
    real_tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, dtype, pin_memory: real_tensor(data, dtype=dtype))
    monkeypatch.setattr("damoyolo.cuda.kernels.resize.locate_pixels", lambda image: (0, 8, 8, 24, 3, 1))
    image = torch.empty(8, 8, 3, dtype=torch.uint8, device=DEVICE)
    resize_images([OrientedImage(image, 1)], torch.empty(1, 16, 16, 3, dtype=torch.uint8, device=DEVICE))


def call_postprocess(monkeypatch):
    from damoyolo.cuda.postprocess import DevicePostprocess

    real_zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **given: real_zeros(*size, **given))
    sizes_hw = [(8, 8), (4, 4), (2, 2)]
    postprocess = DevicePostprocess(2, 3, sizes_hw, 16, DEVICE, max_candidates=100)
    class_logits = tuple(half(2, 3, *size_hw) for size_hw in sizes_hw)
    postprocess.launch(RawPredictions(class_logits, tuple(half(2, 68, *size_hw) for size_hw in sizes_hw)))


# What each wrapper runs: how many kernels, and a call of it with tensors of the second device.
WRAPPERS = {
    "focus_stem": (
        1,
        lambda _: focus_stem(
            torch.empty(1, 3, 32, 32, dtype=torch.uint8, device=DEVICE),
            half(8, 3, 6, 6), half(8), half(8, 8), half(8), torch.float16,
        ),
    ),
    "pointwise_conv": (1, lambda _: pointwise_conv([half(1, 8, 4, 4)], half(8, 8), half(8), "relu")),
    "pyramid_max_pool": (2, lambda _: pyramid_max_pool(half(1, 8, 4, 4))),
    "add_bias_and_activate": (1, lambda _: add_bias_and_activate(half(1, 8, 4, 4), half(8), "silu")),
    "resize_images": (1, call_resize),
    "_run": (4, call_postprocess),
}  # fmt: skip


class Guards:
    """In place of `torch.cuda.device`: remembers which devices are entered."""

    def __init__(self, monkeypatch):
        self.entered = [torch.device("cuda:0")]
        monkeypatch.setattr(torch.cuda, "device", self.enter)

    @contextlib.contextmanager
    def enter(self, device):
        self.entered.append(device)
        yield
        self.entered.pop()


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_runs_its_kernels_on_the_device_of_its_tensors(name, monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    guards = Guards(monkeypatch)
    launched_on = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda *_, **__: launched_on.append(guards.entered[-1]))
    kernels, call = WRAPPERS[name]
    with FakeTensorMode():
        call(monkeypatch)
    assert launched_on == [DEVICE] * kernels


def calls_of_kernels(tree):
    """Names of functions that call `launch`, and lines that launch as Triton has it: kernel[grid](...)."""
    launching, lines = set(), []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                lines.append(node.lineno)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "launch":
                launching.add(function.name)
    return launching, lines


def test_no_kernel_is_launched_in_another_way_and_no_wrapper_is_left_out_above():
    launching, found = set(), {}
    for path in (HANDLER_DIR / "damoyolo").rglob("*.py"):
        names, lines = calls_of_kernels(ast.parse(path.read_text()))
        launching |= names
        if lines:
            found[path.relative_to(HANDLER_DIR).as_posix()] = len(lines)
    assert found == {"damoyolo/cuda/kernels/__init__.py": 1}
    assert launching == WRAPPERS.keys()


def test_tensors_of_two_devices_are_refused():
    with FakeTensorMode(), pytest.raises(ValueError, match="cuda:0, cuda:1; one device is needed"):
        launch(None, (1,), torch.empty(1, device="cuda:0"), torch.empty(1, device=DEVICE))
