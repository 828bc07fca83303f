"""Timing in turn, tables and JSON rows."""

import json
import math

import pytest
import torch

from lib.measure.timing import append_json_rows, format_table, interleaved_medians_s


def test_calls_take_turns_after_a_warm_up_and_run_at_least_once_a_turn():
    log = []
    calls = {name: lambda name=name: log.append(name) for name in "ab"}
    medians_s = interleaved_medians_s(calls, torch.device("cpu"), rounds=3, slice_s=0.0)
    assert log == list("abababab")
    assert all(0 < seconds < 1 for seconds in medians_s.values())


def test_a_table_aligns_text_to_the_left_and_numbers_to_the_right():
    columns = {"name": ("name", ""), "ms": ("ms", ".1f"), "note": ("note", "")}
    rows = [{"name": "a", "ms": 12.34}, {"name": "longer", "note": "slow"}]
    assert format_table(rows, columns).splitlines() == [
        "name      ms  note",
        "a       12.3  -",
        "longer     -  slow",
    ]


def test_json_rows_are_appended_with_what_holds_for_all_and_nan_is_refused(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    append_json_rows(file, [{"ms": 1}], {"gpu": "x"})
    append_json_rows(file, [{"ms": 2}], {"gpu": "y"})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"ms": 1, "gpu": "x"},
        {"ms": 2, "gpu": "y"},
    ]
    with pytest.raises(ValueError, match="JSON"):
        append_json_rows(file, [{"ms": math.nan}], {})
