"""Time calls for comparison: in turn within one run, after warming up, as medians; tables and JSON rows."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_medians_s(
    calls: Mapping[str, Call], device: torch.device, rounds: int = 5, slice_s: float = 0.3
) -> dict[str, float]:
    """Median seconds of one execution of each call.

    The calls take turns for `rounds` rounds, `slice_s` seconds a turn (at least one execution), so that a
    machine that becomes slower or faster affects all of them alike. The sample of a turn is its mean.
    """
    for call in calls.values():
        call()
    synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(mean_of_slice_s(call, device, slice_s))
    return {name: statistics.median(values) for name, values in samples.items()}


def mean_of_slice_s(call: Call, device: torch.device, slice_s: float) -> float:
    """Mean seconds of one execution, over as many executions as fit into `slice_s` seconds (at least one).

    Includes the time until the device is idle again.
    """
    executions = 0
    started = time.perf_counter()
    while executions == 0 or time.perf_counter() - started < slice_s:
        call()
        executions += 1
    synchronize(device)
    return (time.perf_counter() - started) / executions


def format_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """Rows as text. columns: key -> (heading, format of a value); a missing value becomes a dash.

    Columns without a format hold text and are aligned to the left.
    """
    texts = []
    for key, (heading, form) in columns.items():
        values = [row.get(key) for row in rows]
        cells = [heading, *("-" if value is None else format(value, form) for value in values)]
        width = max(map(len, cells))
        texts.append([cell.rjust(width) if form else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*texts, strict=True))


def append_json_rows(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Append each row, together with the facts that hold for all rows, as a line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **facts}, allow_nan=False) + "\n")
