import ctypes
import logging

import torch

from damoyolo.cuda.blocking_sync import enable_blocking_sync


class FakeDriver:
    """Takes the calls of the CUDA driver; `answer` is what each of them returns."""

    def __init__(self, answer=0):
        self.answer = answer
        self.calls = []

    def cuInit(self, flags):  # noqa: N802
        self.calls.append(("init", flags))
        return self.answer

    def cuDeviceGet(self, _handle, index):  # noqa: N802
        self.calls.append(("device", index))
        return self.answer

    def cuDevicePrimaryCtxSetFlags_v2(self, _handle, flags):  # noqa: N802
        self.calls.append(("flags", flags))
        return self.answer


def test_blocking_sync_is_set_for_the_worker_s_device(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert enable_blocking_sync(torch.device("cuda", 3))
    assert driver.calls == [("init", 0), ("device", 3), ("flags", 4)]


def test_a_driver_that_refuses_costs_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(answer=100))
    with caplog.at_level(logging.WARNING):
        assert not enable_blocking_sync(torch.device("cuda"))
    assert "refused" in caplog.text


def test_a_missing_driver_costs_a_warning(monkeypatch, caplog):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with caplog.at_level(logging.WARNING):
        assert not enable_blocking_sync(torch.device("cuda"))
    assert "libcuda.so.1" in caplog.text
