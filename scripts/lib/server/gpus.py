"""Which GPUs a server and its workers use, and how TorchServe has spread the workers over them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lib.cli import ScriptError
from lib.server.mps import VISIBLE_DEVICES, cuda_mps, visible_devices


def require_device_indices(environment: Mapping[str, str]) -> None:
    """Check the variable with which a server is about to start.

    Raises:
        ScriptError: it names GPUs in another way than by index; TorchServe 0.12 would end while it starts.
    """
    others = [entry for entry in visible_devices(environment) or () if not entry.isdecimal()]
    if others:
        raise ScriptError(
            f"{VISIBLE_DEVICES} has {', '.join(others)}; TorchServe accepts indices alone, say "
            f"{VISIBLE_DEVICES}=0,1 (nvidia-smi -L lists them); with --mps any name will do"
        )


def first_gpus(count: int) -> dict[str, str]:
    """The variables that leave a server the first `count` of the GPUs that this process sees.

    Raises:
        ScriptError: there are fewer.
    """
    import torch

    found = torch.cuda.device_count()
    if count > found:
        limit = os.environ.get(VISIBLE_DEVICES)
        because = "" if limit is None else f" ({VISIBLE_DEVICES} is {limit!r})"
        raise ScriptError(f"{count} GPUs were requested; found: {found}{because}")
    entries = visible_devices(os.environ) or [str(index) for index in range(found)]
    return {VISIBLE_DEVICES: ",".join(entries[:count])}


def count_gpus() -> int:
    """How many GPUs CUDA finds, for a command that must not load PyTorch itself because it forks.

    Unlike nvidia-smi, CUDA counts by all of the forms of `CUDA_VISIBLE_DEVICES`.

    Raises:
        ScriptError: PyTorch cannot be asked.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0  # without the seconds that PyTorch takes
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise ScriptError(f"cannot count the GPUs: {done.stderr.strip()}")
    return int(done.stdout)


@contextlib.contextmanager
def gpu_environment(count: int | None, mps: bool) -> Iterator[dict[str, str]]:
    """Variables for a server: for `count` GPUs (None: all that are visible), with MPS where wanted.

    Raises:
        ScriptError: there are fewer GPUs, or MPS does not start.
    """
    visible = {} if count is None else first_gpus(count)
    with cuda_mps(mps, visible) as variables:
        yield visible | variables


def workers_per_gpu(description: Mapping[str, Any]) -> dict[str, int]:
    """Number of workers by index of the GPU; empty on a CPU, and where nvidia-smi does not answer the server.

    description: the management API's, whose `gpuUsage` of a worker starts with "gpuId::1".
    """
    usages = (re.match(r"gpuId::(\d+)", worker.get("gpuUsage", "")) for worker in description["workers"])
    return dict(sorted(Counter(usage[1] for usage in usages if usage).items()))
