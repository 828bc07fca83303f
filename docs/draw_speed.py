"""Draw docs/speed.png from the measured rates: python docs/draw_speed.py

The figures are those of docs/served.md and docs/performance.md, which have the commands, the hosts and the
runs. Rates of different cards are in panels of their own.
"""

import sys
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "scripts"))

from lib.measure.plots import new_figure  # noqa: E402


class Panel(NamedTuple):
    """What was measured on one kind of card: name of a bar -> images/s."""

    title: str
    rates: dict[str, int]
    served: tuple[str, ...]


PANELS = (
    Panel(
        "one H200",
        {
            "plain PyTorch detector (version 0.1.0)": 516,
            "served, 384 clients": 9_874,
            "served, 768 clients": 10_367,
            "network alone": 10_935,
        },
        ("served, 384 clients", "served, 768 clients"),
    ),
    Panel(
        "one H100",
        {"served, 384 clients": 9_058, "served, 768 clients": 9_547, "network alone": 9_979},
        ("served, 384 clients", "served, 768 clients"),
    ),
    Panel(
        "several H100s (an earlier version; two and four GPUs on different hosts)",
        {
            "1 GPU": 7_193,
            "2 GPUs of the same host": 14_308,
            "1 GPU of another host": 7_307,
            "4 GPUs of that host": 28_801,
        },
        ("1 GPU", "2 GPUs of the same host", "1 GPU of another host", "4 GPUs of that host"),
    ),
)
SERVED, OTHER = "#1f77b4", "#b8c4ce"


def main():
    """Write the picture."""
    figure, first = new_figure((8, 4.8), rows=len(PANELS))
    axes = [first, *(figure.add_subplot(len(PANELS), 1, row + 1) for row in range(1, len(PANELS)))]
    for panel, ax in zip(PANELS, axes, strict=True):
        names, rates = list(panel.rates), list(panel.rates.values())
        bars = ax.barh(names, rates, color=[SERVED if name in panel.served else OTHER for name in names])
        ax.bar_label(bars, [f"{rate:,}" for rate in rates], padding=4)
        ax.set_title(panel.title, loc="left", fontsize=10)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.12 * max(rates))
        ax.set_xticks([])
        ax.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(
        "images per second, DAMO-YOLO-S at 640x640 (blue: served over HTTP; each panel has its own scale)",
        fontsize=10,
    )
    figure.savefig(DOCS / "speed.png", dpi=120)


if __name__ == "__main__":
    main()
