"""Find the setting of the server that a worker must know and TorchServe does not tell it."""

from __future__ import annotations

import os
import re
from pathlib import Path

DEFAULT_MAX_RESPONSE_SIZE = 6_553_500  # TorchServe's
_MAX_RESPONSE_SIZE = re.compile(r"^\s*max_response_size\s*[=:\s]\s*(\d+)\s*$", re.MULTILINE)


def read_max_response_size(server_pid: int) -> int:
    """Bytes of the largest answer that the server takes from a worker; one byte more ends the worker.

    From the settings file that the server was started with; the server's default without one.

    server_pid: the worker's parent process.
    """
    process = Path("/proc") / str(server_pid)
    try:
        arguments = (process / "cmdline").read_text(errors="replace").split("\0")
        given = arguments[arguments.index("-f") + 1] if "-f" in arguments else "config.properties"
        path = process / "cwd" / os.environ.get("TS_CONFIG_FILE", given)
        found = _MAX_RESPONSE_SIZE.findall(path.read_text(errors="replace"))
    except (OSError, IndexError):
        found = []
    return int(found[-1]) if found else DEFAULT_MAX_RESPONSE_SIZE
