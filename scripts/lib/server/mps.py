"""Run NVIDIA's Multi-Process Service (MPS), so that kernels of several workers run on one GPU at once.

Without it the GPU gives each process a time slice, and no worker fills the pauses of another. The price: a
fault on a device ends every worker on that device, and until they are gone the service takes no new worker on
any of its devices (NVIDIA's MPS documentation, "Error Containment").

One service serves all GPUs that it sees and numbers them from 0 for its clients. `CUDA_VISIBLE_DEVICES` must
therefore not reach both as it is: with "0,2" the clients would look for the third of two devices (the same
documentation, "CUDA_VISIBLE_DEVICES"). Here the service gets it, and the clients get the new numbers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lib.cli import ScriptError
from lib.server.watcher import Watcher

CONTROL_PROGRAM = "nvidia-cuda-mps-control"
# Where container runtimes mount the driver's programs without putting them on the path.
FURTHER_FOLDERS = ("/usr/local/nvidia/bin", "/usr/bin")
CONTROL_TIMEOUT_S = 30.0
QUIT = "quit -t 10\n"
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def visible_devices(environment: Mapping[str, str]) -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES; None where it is not set and all devices are visible."""
    value = environment.get(VISIBLE_DEVICES)
    return None if value is None else [entry.strip() for entry in value.split(",") if entry.strip()]


def find_control_program() -> str:
    """Path of nvidia-cuda-mps-control.

    Raises:
        ScriptError: it is not on this machine.
    """
    search_path = os.pathsep.join([os.environ.get("PATH", ""), *FURTHER_FOLDERS])
    program = shutil.which(CONTROL_PROGRAM, path=search_path)
    if program is None:
        raise ScriptError(f"{CONTROL_PROGRAM}, a part of NVIDIA's driver, was not found; start without --mps")
    return program


@contextlib.contextmanager
def cuda_mps(wanted: bool = True, visible: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """A private service inside the context; yields the environment variables by which processes find it.

    If this process is killed, a watcher ends the service and removes its folder.

    wanted: false starts nothing and yields no variables.
    visible: `CUDA_VISIBLE_DEVICES` of the service where it is not that of this process.

    Raises:
        ScriptError: it cannot be started.
    """
    if not wanted:
        yield {}
        return
    program = find_control_program()
    # A short path, because it holds sockets, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="mps-", dir="/tmp"))
    variables = {
        "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
    }
    for path in variables.values():
        Path(path).mkdir()
    environment = {**os.environ, **(visible or {}), **variables}
    devices = visible_devices(environment)
    of_clients = {} if devices is None else {VISIBLE_DEVICES: ",".join(map(str, range(len(devices))))}
    watcher = Watcher(folder, [program], QUIT, environment)
    try:
        started = _control([program, "-d"], environment)
        if started.returncode != 0:
            raise ScriptError(f"{CONTROL_PROGRAM} -d failed: {(started.stderr or started.stdout).strip()}")
        yield variables | of_clients
    finally:
        # The service may also run after a start that failed or was interrupted. The watcher goes last, so
        # that it takes over if a signal interrupts this, too.
        with contextlib.suppress(ScriptError):
            _control([program], environment, QUIT)
        shutil.rmtree(folder, ignore_errors=True)
        watcher.dismiss()


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
        raise ScriptError(f"{CONTROL_PROGRAM}: {error}") from error
