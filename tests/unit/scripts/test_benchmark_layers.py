"""The command that measures every layer."""

import pytest
import torch

from lib.measure.cudnn_plans import ConvSpec
from lib.measure.layer_timing import padded_channels, variants_of

from benchmark_layers import main, markdown_table, plan_column, summarised, totals

CONV = ConvSpec(64, 88, 128, 80, 80, 3, 1, torch.float16, torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_without_cuda_is_refused(capsys):
    assert main(["--device", "cpu"]) == 1
    assert "measured on a CUDA device" in capsys.readouterr().err


def test_the_variants_of_a_convolution_are_distinct_and_int8_in_sixteens():
    variants = list(variants_of(CONV))
    assert len({variant.name for variant in variants}) == len(variants)
    assert {variant.layer for variant in variants} == {"3x3 88->128 at 80x80"}
    assert variants[0].work == CONV
    for variant in variants:
        if variant.kind == "plans" and variant.work.in_type == torch.int8:
            assert variant.work.in_channels % 16 == variant.work.out_channels % 16 == 0
    assert padded_channels(CONV, 64).in_channels == 128


def test_the_table_takes_the_fastest_of_each_kind_and_totals_count_each_layer():
    names = {variant.kind + variant.name: variant for variant in variants_of(CONV)}
    times = iter(range(100, 0, -1))
    measured = [
        {"layer": v.layer, "kind": v.kind, "variant": v.name, "us": float(next(times))}
        for v in names.values()
    ]
    measured.append(
        {"layer": measured[0]["layer"], "kind": "plans", "variant": "plans: int8->int8 x", "error": "no"}
    )
    other = {"layer": "other", "count": 1, "limit_us": 1.0, "gflop": 1.0, "mib": 1.0, "bound": "memory"}
    rows = [{"layer": measured[0]["layer"], "count": 4, "limit_us": 50.0}, other]
    table = summarised(rows, measured)
    assert table[0]["served_us"] == 100.0
    assert table[0]["padded_us"] == min(row["us"] for row in measured if row["kind"] == "padded")
    assert table[0]["best_padding"] == "128->128"
    assert table[0]["of_limit"] == 0.5
    fastest = min(table[0][key] for key in ("served_us", "padded_us", "fp16_us"))
    assert table[0]["int8_gain"] == fastest / table[0]["int8_us"]
    assert "served_us" not in table[1]
    assert totals(table)[0] == "limit: 0.201 ms (2 of 2 layers)"
    assert totals(table)[1] == "as served: 0.400 ms (1 of 2 layers)"
    assert markdown_table(table).count("\n") == 3


@pytest.mark.parametrize(
    ("variant", "column"),
    [
        ("plans: float16->float16 3x3", "fp16_us"),
        ("plans: int8->int8 3x3", "int8_us"),
        ("plans: int8->float16 3x3", "int8_fp16_us"),
    ],
)
def test_plans_go_to_the_column_of_their_types(variant, column):
    assert plan_column(variant) == column
