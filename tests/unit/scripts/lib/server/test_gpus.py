"""Choosing GPUs for a server, with a stand-in for MPS's control program."""

import subprocess

import pytest
import torch

from lib.cli import ScriptError
from lib.server import mps
from lib.server.gpus import count_gpus, first_gpus, gpu_environment, require_device_indices, workers_per_gpu

VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.fixture(autouse=True)
def _four_gpus(monkeypatch):
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def test_a_server_gets_the_first_gpus_of_those_that_are_visible(monkeypatch):
    assert first_gpus(2) == {VISIBLE: "0,1"}
    monkeypatch.setenv(VISIBLE, "6, 3,1,0")
    assert first_gpus(2) == {VISIBLE: "6,3"}


def test_more_gpus_than_there_are_is_an_error_that_says_how_many_there_are(monkeypatch):
    with pytest.raises(ScriptError, match=r"^5 GPUs were requested; found: 4$"):
        first_gpus(5)
    monkeypatch.setenv(VISIBLE, "0,1,2,3")
    with pytest.raises(ScriptError, match=r"found: 4 \(CUDA_VISIBLE_DEVICES is '0,1,2,3'\)"):
        first_gpus(5)


@pytest.mark.parametrize("value", ["GPU-8f2c", "0,MIG-1a2b", "0,GPU-8f2c"])
def test_a_gpu_named_in_another_way_than_by_index_is_an_error(value):
    with pytest.raises(ScriptError, match=r"TorchServe accepts indices alone, say CUDA_VISIBLE_DEVICES=0,1"):
        require_device_indices({VISIBLE: value})


@pytest.mark.parametrize("environment", [{}, {VISIBLE: ""}, {VISIBLE: "0"}, {VISIBLE: "3, 0"}])
def test_indices_and_no_limit_are_accepted(environment):
    require_device_indices(environment)


def test_workers_are_counted_by_gpu():
    usages = ["gpuId::1 utilization.gpu [%]::7 %", "gpuId::0 x", "gpuId::1 x", "N/A", "failed to obtained"]
    workers = [{"gpuUsage": usage} for usage in usages] + [{}]
    assert workers_per_gpu({"workers": workers}) == {"0": 1, "1": 2}


@pytest.fixture
def started_with(tmp_path, monkeypatch):
    """The file in which the control program writes the devices that it sees."""
    program = tmp_path / mps.CONTROL_PROGRAM
    program.write_text(f'#!/bin/sh\ncat >/dev/null\necho "${{{VISIBLE}-all}}" >>"$0.log"\n')
    program.chmod(0o755)
    monkeypatch.setattr(mps, "find_control_program", lambda: str(program))
    return program.with_name(f"{program.name}.log")


# Devices of this process, GPUs requested; devices of the service and of its clients.
@pytest.mark.parametrize(
    ("visible", "count", "of_service", "of_clients"),
    [
        (None, None, "all", None),
        (None, 2, "0,1", "0,1"),
        ("2,3", None, "2,3", "0,1"),
        ("2,3", 1, "2", "0"),
        ("GPU-8f2c,GPU-9a1b", 1, "GPU-8f2c", "0"),
    ],
)
def test_the_service_gets_the_devices_and_its_clients_their_new_numbers(
    visible, count, of_service, of_clients, started_with, monkeypatch
):
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    with gpu_environment(count, mps=True) as variables:
        assert variables.get(VISIBLE) == of_clients
        assert "CUDA_MPS_PIPE_DIRECTORY" in variables
        require_device_indices(variables)
    assert started_with.read_text().splitlines() == [of_service] * 2


def test_without_mps_the_server_gets_the_devices_as_they_are(monkeypatch):
    monkeypatch.setenv(VISIBLE, "2,3")
    with gpu_environment(1, mps=False) as variables:
        assert variables == {VISIBLE: "2"}
    with gpu_environment(None, mps=False) as variables:
        assert variables == {}


def test_gpus_are_counted_by_another_process_where_there_is_cuda(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert count_gpus() == 0
    monkeypatch.setattr("ctypes.CDLL", lambda _: None)
    asked = []

    def run(command, **_):
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, *results.pop())

    results = [(1, "", "no torch\n"), (0, "3\n", "")]
    monkeypatch.setattr("subprocess.run", run)
    assert count_gpus() == 3
    assert "torch.cuda.device_count()" in asked[0]
    with pytest.raises(ScriptError, match="cannot count the GPUs: no torch"):
        count_gpus()
