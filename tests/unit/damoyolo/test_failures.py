"""What an unexpected exception means, by injection and on a real device."""

import errno
import subprocess
import sys

import pytest
import torch

from damoyolo import failures
from damoyolo.errors import DeviceLostError
from damoyolo.failures import Failure, classify, free_cached_memory, is_alive

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def accelerator_error(text, code=None):
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code  # as PyTorch sets it
    return error


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    accelerator_error("CUDA error: out of memory", code=2),  # pinned memory
    accelerator_error("CUDA error: out of memory"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 80000000000 bytes."),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("nvjpegDecodeBatched failed: NVJPEG_STATUS_ALLOCATOR_FAILURE"),
    RuntimeError("std::bad_alloc"),
]
OTHER = [
    RuntimeError("surprise"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    accelerator_error("CUDA error: invalid configuration argument", code=9),
    accelerator_error("CUDA error: an illegal memory access was encountered", code=700),
    ValueError("out of memory, says a client's text"),
    OSError(errno.ENOENT, "out of memory"),
    KeyError("x"),
]


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("error", OUT_OF_MEMORY + OTHER, ids=repr)
def test_the_device_decides_whether_it_is_lost_and_the_error_whether_memory_was_short(
    error, alive, device, monkeypatch
):
    monkeypatch.setattr(failures, "is_alive", lambda asked: alive or asked.type == "cpu")
    expected = Failure.OUT_OF_MEMORY if error in OUT_OF_MEMORY else Failure.OTHER
    assert classify(error, device) is (expected if alive or device == CPU else Failure.DEVICE_LOST)


def test_a_device_once_found_lost_stays_lost():
    assert classify(DeviceLostError(), CPU) is Failure.DEVICE_LOST


@pytest.mark.parametrize("step", ["add_", "synchronize"])
@pytest.mark.parametrize(
    ("error", "alive"),
    [
        (accelerator_error("CUDA error: unspecified launch failure", code=719), False),
        (RuntimeError("CUDA driver error: device-side assert triggered"), False),
        (accelerator_error("CUDA error: out of memory", code=2), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (None, True),
    ],
)
def test_a_device_is_lost_if_the_smallest_work_fails_but_not_for_lack_of_memory(
    step, error, alive, monkeypatch
):
    def run(at):
        if at == step and error is not None:
            raise error

    class Probe:
        def add_(self, _):
            run("add_")

    monkeypatch.setattr(failures, "_probe", lambda _: Probe())
    monkeypatch.setattr("torch.cuda.synchronize", lambda _: run("synchronize"))
    assert is_alive(CUDA) is alive


def test_an_error_left_behind_by_an_earlier_call_is_no_lost_device(monkeypatch):
    left = [accelerator_error("CUDA error: invalid argument", code=1)]

    class Probe:
        def add_(self, _):
            if left:
                raise left.pop()

    monkeypatch.setattr(failures, "_probe", lambda _: Probe())
    monkeypatch.setattr("torch.cuda.synchronize", lambda _: None)
    assert is_alive(CUDA)
    assert not left


def test_a_cpu_is_never_lost_and_has_nothing_to_give_back(monkeypatch):
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: pytest.fail("called"))
    assert is_alive(CPU)
    free_cached_memory(CPU)


def test_both_caches_are_emptied(monkeypatch):
    emptied = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append("device"))
    monkeypatch.setattr("torch._C._host_emptyCache", lambda: emptied.append("pinned"))
    free_cached_memory(CUDA)
    assert emptied == ["device", "pinned"]


def test_an_allocation_that_no_machine_can_make_is_a_lack_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15, dtype=torch.uint8)
    assert classify(caught.value, CPU) is Failure.OUT_OF_MEMORY


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_too_little_memory_leaves_a_real_device_alive(pinned):
    assert is_alive(CUDA)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**14, dtype=torch.uint8, **({"pin_memory": True} if pinned else {"device": CUDA}))
    assert classify(caught.value, CUDA) is Failure.OUT_OF_MEMORY
    free_cached_memory(CUDA)
    assert is_alive(CUDA)


LOSE_DEVICE = """
import torch
from damoyolo.failures import Failure, classify, is_alive
device = torch.device("cuda", 0)
assert is_alive(device)
bound = torch.zeros(1, dtype=torch.long, device=device)
torch.arange(4, device=device)[bound + 99]  # an assertion on the device, noticed later
try:
    torch.cuda.Event(enable_timing=True).synchronize()
    torch.cuda.synchronize()
except RuntimeError as error:
    assert classify(error, device) is Failure.DEVICE_LOST
    assert classify(ValueError("of later work"), device) is Failure.DEVICE_LOST
    print("lost")
"""


@pytest.mark.gpu
@needs_gpu
def test_a_real_lost_device_is_recognised(project_dir):
    run = subprocess.run(
        [sys.executable, "-c", LOSE_DEVICE], cwd=project_dir / "handler", capture_output=True, timeout=300
    )
    assert run.stdout.strip() == b"lost", run.stderr.decode()[-3000:]
