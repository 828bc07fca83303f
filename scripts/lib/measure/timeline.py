"""Draw the timeline of workers from their chrome traces: stages of the host, streams of the GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lib.measure.plots import new_figure

from damoyolo.stage_timing import NETWORK, PARSE, POSTPROCESS, PREPROCESS, RESPOND

HOST_STAGES = (PARSE, PREPROCESS, NETWORK, POSTPROCESS, RESPOND)
COPY_TO_DEVICE, COPY_FROM_DEVICE = "copy to the device", "copy to the host"
# Parts of the names of this project's kernels; what else runs on the GPU is of the decoder or the network.
KERNELS = {
    PREPROCESS: ("resize", "jpeg", "ycc", "yuv", "upsample", "nv12"),
    POSTPROCESS: ("find_candidates", "rank_and_decode", "find_suppressors", "resolve_and_write"),
}
COLOURS = {
    PARSE: "C7",
    PREPROCESS: "C0",
    NETWORK: "C1",
    POSTPROCESS: "C2",
    RESPOND: "C4",
    COPY_TO_DEVICE: "C9",
    COPY_FROM_DEVICE: "C6",
}


class Span(NamedTuple):
    """A piece of work: what it is for (a key of `COLOURS`), when it began, and for how long."""

    kind: str
    start_ms: float
    duration_ms: float


Rows = dict[str, list[Span]]  # name of a row -> its spans


def read_trace(path: Path) -> Rows:
    """The rows of one process, from a trace of `traces.write_trace`: "host", then a row for each stream.

    Times are on the clock that all processes of the machine share.
    """
    trace = json.loads(path.read_text())
    base_us = trace.get("baseTimeNanoseconds", 0) / 1e3
    host: list[Span] = []
    streams: dict[str, list[Span]] = {}
    for event in trace["traceEvents"]:
        if event.get("ph") != "X" or "dur" not in event:
            continue
        times_ms = (event["ts"] + base_us) / 1e3, event["dur"] / 1e3
        if event.get("cat") == "user_annotation" and event["name"] in HOST_STAGES:
            host.append(Span(event["name"], *times_ms))
        elif event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            stream = f"stream {event['args'].get('stream', event.get('tid'))}"
            streams.setdefault(stream, []).append(Span(device_kind(event["name"]), *times_ms))
    return {"host": host, **dict(sorted(streams.items()))}


def device_kind(name: str) -> str:
    """What a piece of the GPU's work is for, by its name."""
    if name.startswith("Memcpy"):
        return COPY_TO_DEVICE if "HtoD" in name else COPY_FROM_DEVICE if "DtoH" in name else PREPROCESS
    lower = name.lower()
    return next((kind for kind, parts in KERNELS.items() if any(part in lower for part in parts)), NETWORK)


def draw_timeline(path: Path, workers: Sequence[Rows], title: str, length_ms: float) -> None:
    """Draw `length_ms` from the middle of what all workers recorded, as a PNG."""
    spans = [[span for row in rows.values() for span in row] for rows in workers]
    first = max(min(span.start_ms for span in each) for each in spans)
    last = min(max(span.start_ms + span.duration_ms for span in each) for each in spans)
    start_ms = max(first, (first + last - length_ms) / 2)
    named: dict[str, list[Span]] = {
        (f"worker {index}, {name}" if len(workers) > 1 else name): row
        for index, rows in enumerate(workers, 1)
        for name, row in rows.items()
    }
    _draw_rows(path, named, title, start_ms, length_ms)


def _draw_rows(
    path: Path, rows: Mapping[str, Sequence[Span]], title: str, start_ms: float, length_ms: float
) -> None:
    figure, axes = new_figure((12, 1.6 + 0.33 * len(rows)))
    for index, spans in enumerate(rows.values()):
        for kind, colour in COLOURS.items():
            bars = [
                (span.start_ms - start_ms, span.duration_ms)
                for span in spans
                if span.kind == kind
                and span.start_ms < start_ms + length_ms
                and span.start_ms + span.duration_ms > start_ms
            ]
            if bars:
                axes.broken_barh(bars, (index - 0.4, 0.8), facecolors=colour)
    for kind, colour in COLOURS.items():
        axes.plot([], [], "s", color=colour, label=kind)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, length_ms), xlabel="ms", title=title)
    axes.grid(alpha=0.3, axis="x")
    figure.legend(fontsize=8, ncols=len(COLOURS), loc="outside lower center")
    figure.savefig(path, dpi=120)
