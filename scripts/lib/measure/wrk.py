"""Measure a server with wrk, as a cross-check of the load generator."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from lib.cli import ScriptError
from lib.load.worker import Load

# The bodies in turn; each thread has its own state and starts with the first.
SCRIPT = """\
local bodies, count = {{}}, 0
for index = 1, {count} do
  local file = io.open("{folder}/" .. index, "rb")
  bodies[index] = file:read("*a")
  file:close()
end
request = function()
  count = count + 1
  return wrk.format("POST", nil, {{{headers}}}, bodies[count % #bodies + 1])
end
done = function(summary, latency)
  local errors = summary.errors
  print(string.format("found %d %d %f %f %d", summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


def find_wrk() -> str | None:
    """The program's path; None where it is not installed."""
    return shutil.which("wrk")


def measure_by_wrk(wrk: str, load: Load) -> dict[str, Any]:
    """Requests/s, p50 and p99 in ms, and errors of the load's closed loop.

    Raises:
        ScriptError: wrk fails.
    """
    with tempfile.TemporaryDirectory(prefix="wrk-") as folder:
        for index, body in enumerate(load.bodies, 1):
            (Path(folder) / str(index)).write_bytes(body)
        headers = ", ".join(f'["{name}"] = "{value}"' for name, value in load.headers)
        script = Path(folder) / "post.lua"
        script.write_text(SCRIPT.format(count=len(load.bodies), folder=folder, headers=headers))
        threads = min(load.processes or 1, load.connections)
        command = [wrk, "-t", str(threads), "-c", str(load.connections), "-d", f"{load.duration_s:.0f}s"]
        command += ["--timeout", f"{load.timeout_s:.0f}s", "-s", str(script), load.url]
        limit_s = load.duration_s + 2 * load.timeout_s
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise ScriptError(f"wrk did not end within {limit_s:.0f} s") from None
    return _parse(done.stdout, done.stderr)


def _parse(printed: str, complaint: str) -> dict[str, Any]:
    found = re.search(r"^found (\d+) (\d+) ([\d.]+) ([\d.]+) (\d+)$", printed, re.MULTILINE)
    if found is None:
        raise ScriptError(f"wrk failed: {(complaint or printed).strip()}")
    requests, duration_us, p50_us, p99_us, errors = map(float, found.groups())
    return {
        "requests_per_s": (requests - errors) / (duration_us / 1e6),
        "p50_ms": p50_us / 1e3,
        "p99_ms": p99_us / 1e3,
        "errors": int(errors),
    }
