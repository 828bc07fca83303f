"""Load generators of others on the same server: wrk where it is installed, the command for perf_analyzer."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from lib.load.generator import PERCENTILES, LoadError, LoadResult

# Reads the images once a thread; its last line is what `run_wrk` reads.
WRK_SCRIPT = """
local requests = {}
local current = 0

function init(args)
  local headers = {["Content-Type"] = "application/octet-stream"}
  for index, name in ipairs(args) do
    local file = assert(io.open(name, "rb"))
    requests[index] = wrk.format("POST", wrk.path, headers, file:read("*a"))
    file:close()
  end
end

function request()
  current = current % #requests + 1
  return requests[current]
end

function done(summary, latency, requests)
  local errors = summary.errors
  local ranks = {RANKS}
  local values = {}
  for index, rank in ipairs(ranks) do
    values[index] = string.format("%.3f", rank < 100 and latency:percentile(rank) or latency.max)
  end
  io.write(string.format(
    '\\n{"requests":%d,"duration_us":%d,"status":%d,"socket":%d,"timeout":%d,"latencies_us":[%s]}\\n',
    summary.requests, summary.duration, errors.status, errors.connect + errors.read + errors.write,
    errors.timeout, table.concat(values, ",")))
end
"""


def run_wrk(
    url: str,
    bodies: Sequence[bytes],
    connections: int,
    duration_s: int,
    threads: int,
    timeout_s: int = 30,
) -> LoadResult:
    """A closed loop by wrk, which knows no warm-up and counts error answers among the latencies.

    Raises:
        LoadError: wrk is not installed or failed; with what it printed.
    """
    program = shutil.which("wrk")
    if program is None:
        raise LoadError("wrk is not on the path; install it, or use the built-in generator")
    with tempfile.TemporaryDirectory(prefix="wrk-") as name:
        folder = Path(name)
        script = folder / "images.lua"
        ranks = ",".join(str(rank) for rank in PERCENTILES.values())
        script.write_text(WRK_SCRIPT.replace("RANKS", ranks))
        files = []
        for index, body in enumerate(bodies):
            files.append(str(folder / f"{index}.bin"))
            Path(files[-1]).write_bytes(body)
        command = [program, f"-t{min(threads, connections)}", f"-c{connections}", f"-d{duration_s}s"]
        command += [f"--timeout={timeout_s}s", "-s", str(script), url, "--", *files]
        started_s = time.monotonic()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=duration_s + timeout_s + 30
            )
        except subprocess.TimeoutExpired:
            raise LoadError(f"wrk did not end: {shlex.join(command)}") from None
    if done.returncode != 0 or not done.stdout.strip().endswith("}"):
        raise LoadError(f"wrk failed: {(done.stderr or done.stdout).strip()}")
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    answered = summary["requests"] - summary["status"]
    statuses = {200: answered, **({0: summary["status"]} if summary["status"] else {})}
    return LoadResult(
        requests_per_s=answered / (summary["duration_us"] / 1e6),
        percentiles_ms={
            rank: value / 1e3 for rank, value in zip(PERCENTILES, summary["latencies_us"], strict=True)
        },
        statuses=statuses,  # wrk does not tell which error status; 0 stands for all
        connection_errors={"wrk": summary["socket"]} if summary["socket"] else {},
        timeouts=summary["timeout"],
        dropped=0,
        mean_answer_bytes=math.nan,
        generator_busy_share=math.nan,
        window_s=(started_s, started_s + summary["duration_us"] / 1e6),
    )


def write_perf_analyzer_input(images: Sequence[Path], path: Path) -> Path:
    """The file that names the images for perf_analyzer, each sent as multipart part `data`."""
    streams = [{"TORCHSERVE_INPUT": [str(image.resolve())]} for image in images]
    path.write_text(json.dumps({"data": streams}, indent=1))
    return path


def perf_analyzer_command(
    inference_url: str, model_name: str, input_file: Path, concurrency: int
) -> list[str]:
    """The command by which NVIDIA's perf_analyzer (of the Triton SDK) drives this server in a closed loop.

    Options as its documentation gives them for TorchServe, where it speaks HTTP alone and sends one image a
    request.
    """
    return [
        "perf_analyzer",
        *("-m", model_name),
        *("--service-kind", "torchserve"),
        *("-i", "http"),
        *("-u", urlsplit(inference_url).netloc),
        *("-b", "1"),
        *("-p", "5000"),
        *("--concurrency-range", str(concurrency)),
        *("--percentile", "99"),
        *("--input-data", str(input_file)),
    ]
