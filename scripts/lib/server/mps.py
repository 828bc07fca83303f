"""NVIDIA's Multi-Process Service: lets the kernels of several workers run on one GPU at the same time.

Without it the GPU gives each process a slice of time and switches between them, so that the pauses of one
worker are not filled by another. The price: a fault on the device ends every worker that shares the service.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

CONTROL_PROGRAM = "nvidia-cuda-mps-control"
# Where container runtimes mount the driver's programs without putting them on the path.
FURTHER_FOLDERS = ("/usr/local/nvidia/bin", "/usr/bin")
CONTROL_TIMEOUT_S = 30.0


class MpsError(Exception):
    """The service could not be started."""


def find_control_program() -> str:
    """Path of the program that controls the service.

    Raises:
        MpsError: it is not on this machine.
    """
    search_path = os.pathsep.join([os.environ.get("PATH", ""), *FURTHER_FOLDERS])
    program = shutil.which(CONTROL_PROGRAM, path=search_path)
    if program is None:
        raise MpsError(f"{CONTROL_PROGRAM}, a part of NVIDIA's driver, was not found; start without --mps")
    return program


@contextlib.contextmanager
def cuda_mps(wanted: bool = True) -> Iterator[dict[str, str]]:
    """A service of one's own while entered; the environment variables by which processes find it.

    wanted: false starts nothing, and there are no variables.

    Raises:
        MpsError: it cannot be started.
    """
    if not wanted:
        yield {}
        return
    program = find_control_program()
    # Short, because it holds sockets, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="mps-", dir="/tmp"))
    variables = {
        "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
    }
    for path in variables.values():
        Path(path).mkdir()
    environment = {**os.environ, **variables}
    try:
        started = _control([program, "-d"], environment)
        if started.returncode != 0:
            raise MpsError(f"{CONTROL_PROGRAM} -d failed: {(started.stderr or started.stdout).strip()}")
        try:
            yield variables
        finally:
            _control([program], environment, "quit -t 10\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _control(
    command: list[str], environment: dict[str, str], text: str | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=environment,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=CONTROL_TIMEOUT_S,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise MpsError(f"{CONTROL_PROGRAM}: {error}") from error
