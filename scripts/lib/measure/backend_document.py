"""The measured rows as Markdown, between two markers of a document whose other text stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
MEASURED_ON = "Measured on "  # begins a section with figures, and no other
OTHER_RUN = "\\*"
# key -> heading, format of a value
COLUMNS = {
    "ap": ("AP", ".4f"),
    "score_difference": ("score diff.", ".1e"),
    "box_difference_px": ("box diff., px", ".2g"),
    "detector_ms": ("ms at batch 1", ".1f"),
    "network_ms": ("of which network", ".1f"),
    "images_per_s": ("images/s at batch 1", ".1f"),
    "best_images_per_s": ("at the best batch", ".1f"),
    "best_batch_size": ("best batch", "d"),
    "resident_mib": ("memory, MiB", ".0f"),
    "peak_mib": ("peak, MiB", ".0f"),
    "device_mib": ("GPU memory, MiB", ".0f"),
    "start_s": ("start, s", ".1f"),
    "archive_mb": ("archive, MB", ".1f"),
}
ON_CUDA_ONLY = ("device_mib",)


class DocumentError(Exception):
    """The document has no place for the table."""


def write_section(document: Path, device: str, text: str) -> None:
    """Put text between the markers of a device's section; nothing else changes.

    Raises:
        DocumentError: a marker is missing, doubled or out of order.
    """
    before, _, after = _split(document, device)
    document.write_text(f"{before}\n{text.strip()}\n{after}", encoding="utf-8")


def has_figures(document: Path, device: str) -> bool:
    """Whether the section of a device holds measured rows.

    Raises:
        DocumentError: as `write_section`.
    """
    return MEASURED_ON in _split(document, device)[1]


def _split(document: Path, device: str) -> tuple[str, str, str]:
    """The text up to and with the first marker, the section, and the rest from the second marker on."""
    content = document.read_text(encoding="utf-8")
    first, last = (f"<!-- table of {device}: {end} -->" for end in ("begin", "end"))
    if content.count(first) != 1 or content.count(last) != 1 or content.index(first) > content.index(last):
        raise DocumentError(
            f"{document} needs the line {first!r}, once, and below it {last!r}, once; the table goes between"
        )
    start, end = content.index(first) + len(first), content.index(last)
    return content[:start], content[start:end], content[end:]


def section_text(rows: Sequence[Row], device: str, measured_on: str | None) -> str:
    """The table of a device.

    rows: in their order. Each has "variant" and "backend", and either figures or "not_run" with the reason.
        Figures have the "turn" in which they were measured: rows of a variant that were not measured together
        with its first measured row are marked, since only those of one turn compare well in speed.
    measured_on: hardware, versions and method, or None if nothing was measured.
    """
    columns = {key: each for key, each in COLUMNS.items() if device == "cuda" or key not in ON_CUDA_ONLY}
    lines = [
        "| " + " | ".join(["model", "backend", *(heading for heading, _ in columns.values())]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    turns: dict[str, Any] = {}
    any_other_run = False
    for row in rows:
        name = row["backend"]
        if "not_run" in row:
            cells = [f"not run ({row['not_run']})", *["-"] * (len(columns) - 1)]
        else:
            cells = [_cell(row.get(key), form) for key, (_, form) in columns.items()]
            if turns.setdefault(row["variant"], row["turn"]) != row["turn"]:
                any_other_run = True
                name += f" {OTHER_RUN}"
        lines.append(f"| {' | '.join([row['variant'], name, *cells])} |")
    texts = [
        f"{MEASURED_ON}{measured_on}." if measured_on is not None else "Nothing measured.",
        "\n".join(lines),
    ]
    if any_other_run:
        texts.append(
            f"{OTHER_RUN} measured in another run than the first row of its model: compare speeds with care."
        )
    return "\n\n".join(texts)


def _cell(value: Any, form: str) -> str:
    return "not run" if value is None else format(value, form)
