"""The table as Markdown: between its markers alone, every row in it, what was not run with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib.measure.backend_document import COLUMNS, DocumentError, has_figures, section_text, write_section

FRAME = """# Title

Written by hand.

<!-- table of cpu: begin -->
old
<!-- table of cpu: end -->

Between.

<!-- table of cuda: begin -->
Measured on a GPU.
<!-- table of cuda: end -->

The end.
"""


def figures(backend: str, turn: str = "first", **others: Any) -> dict[str, Any]:
    """A measured row."""
    return {
        "variant": "S",
        "backend": backend,
        "turn": turn,
        "ap": 0.63391,
        "score_difference": 1.234e-6,
        "box_difference_px": 0.000123,
        "detector_ms": 470.12,
        "network_ms": 450.4,
        "images_per_s": 2.127,
        "best_images_per_s": 2.5,
        "best_batch_size": 4,
        "resident_mib": 901.7,
        "peak_mib": 1502.2,
        "start_s": 1.25,
        "archive_mb": 62.5,
    } | others


def table_rows(text: str) -> list[list[str]]:
    """The cells of each line of the table, the heading and its rule included."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "backends.md"
    path.write_text(FRAME)
    return path


def test_only_what_lies_between_the_markers_of_the_device_changes(document: Path) -> None:
    write_section(document, "cpu", "new\nlines\n")
    assert document.read_text() == FRAME.replace("\nold\n", "\nnew\nlines\n")
    write_section(document, "cpu", "old")
    assert document.read_text() == FRAME


def test_a_section_has_figures_if_it_says_on_what_they_were_measured(document: Path) -> None:
    assert not has_figures(document, "cpu")
    assert has_figures(document, "cuda")
    write_section(document, "cpu", section_text([figures("pytorch fp32")], "cpu", "a CPU"))
    write_section(document, "cuda", section_text([], "cuda", None))
    assert has_figures(document, "cpu")
    assert not has_figures(document, "cuda")


@pytest.mark.parametrize(
    "content",
    [
        "nothing",
        FRAME.replace("<!-- table of cpu: end -->", ""),
        FRAME + FRAME,
        "<!-- table of cpu: end -->\n<!-- table of cpu: begin -->",
    ],
    ids=["none", "one missing", "doubled", "out of order"],
)
def test_a_document_without_a_place_for_the_table_stays_as_it_is(document: Path, content: str) -> None:
    document.write_text(content)
    with pytest.raises(DocumentError, match="table of cpu: begin"):
        write_section(document, "cpu", "new")
    assert document.read_text() == content


def test_a_row_has_a_cell_for_every_column(document: Path) -> None:
    text = section_text([figures("pytorch fp32")], "cpu", "a CPU, 2 threads")
    assert text.startswith("Measured on a CPU, 2 threads.\n")
    heading, rule, row = table_rows(text)
    assert len(heading) == len(rule) == len(row) == len(COLUMNS) + 1  # no GPU memory on a CPU
    assert row == [
        *("S", "pytorch fp32", "0.6339", "1.2e-06", "0.00012", "470.1", "450.4", "2.1", "2.5", "4"),
        *("902", "1502", "1.2", "62.5"),
    ]
    assert "\\*" not in text


def test_on_a_gpu_its_memory_is_a_column() -> None:
    heading, _, row = table_rows(section_text([figures("pytorch fp16", device_mib=512.4)], "cuda", "a GPU"))
    assert row[heading.index("GPU memory, MiB")] == "512"


def test_a_row_that_was_not_run_keeps_its_place_and_says_why() -> None:
    rows = [
        figures("pytorch fp32"),
        {"variant": "S", "backend": "openvino fp32", "not_run": "openvino not installed"},
        figures("onnxruntime fp32"),
    ]
    _, _, first, second, third = table_rows(section_text(rows, "cpu", "a CPU"))
    assert second[:3] == ["S", "openvino fp32", "not run (openvino not installed)"]
    assert set(second[3:]) == {"-"}
    assert len(second) == len(first)
    assert [first[1], third[1]] == ["pytorch fp32", "onnxruntime fp32"]


def test_a_figure_that_was_not_measured_is_marked() -> None:
    _, _, row = table_rows(section_text([figures("pytorch fp32", ap=None)], "cpu", "a CPU"))
    assert row[2] == "not run"


def test_a_section_without_figures_names_no_machine() -> None:
    rows = [{"variant": "S", "backend": "pytorch fp32", "not_run": "no GPU"}]
    assert section_text(rows, "cuda", None).startswith("Nothing measured.\n")


def test_rows_of_another_run_than_the_first_of_their_model_are_marked() -> None:
    rows = [
        figures("pytorch fp32"),
        figures("openvino fp32", turn="second"),
        figures("pytorch fp32", variant="T", turn="second"),
    ]
    text = section_text(rows, "cpu", "a CPU")
    assert [row[1] for row in table_rows(text)[2:]] == ["pytorch fp32", "openvino fp32 \\*", "pytorch fp32"]
    assert "measured in another run" in text
