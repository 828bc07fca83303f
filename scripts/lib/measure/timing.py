"""Times of calls that are compared: in one run, in turn, after warming up, as medians."""

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
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_medians_s(
    calls: Mapping[str, Call], device: torch.device, rounds: int = 5, slice_s: float = 0.3
) -> dict[str, float]:
    """Median seconds of one execution of each call.

    The calls take turns, `rounds` times, `slice_s` seconds each turn (at least one execution), so that a
    machine that slows down or speeds up meanwhile does so for all of them. A turn gives one sample: its mean.
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
    """Mean seconds of one execution, of as many as `slice_s` seconds hold and at least one.

    Timed as a whole, from an idle device to an idle device.
    """
    executions = 0
    started = time.perf_counter()
    while executions == 0 or time.perf_counter() - started < slice_s:
        call()
        executions += 1
    synchronize(device)
    return (time.perf_counter() - started) / executions


def format_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """Rows as text; columns: key -> (heading, format of a value); a missing value is a dash."""
    lines = [[heading for heading, _ in columns.values()]]
    for row in rows:
        lines.append(
            ["-" if row.get(key) is None else format(row[key], form) for key, (_, form) in columns.items()]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def append_json_rows(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Append one line of JSON a row, each with the facts that hold for all."""
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **facts}, allow_nan=False) + "\n")
