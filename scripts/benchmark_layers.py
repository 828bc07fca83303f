"""Measure every distinct layer of the fused network on a CUDA device, against the roofline and alternatives.

    python scripts/benchmark_layers.py --batch-size 64 --json output/layers.json --markdown output/layers.md

For each layer: the operations and the fewest bytes, the least time that follows from a large matrix product
and a large copy measured in the same run, and the time as the fused network calls it. Then the alternatives:
padded channels, and, if nvidia-cudnn-frontend is installed, the fastest of all plans of cuDNN in fp16 and in
INT8 with its epilogue fused. Plans are compiled in several processes at the same time, but only one of them
runs work on the device at a time. Results are written after every measurement.

Prints the table, and what could not be measured.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import ScriptError, command_parser, positive_int, positive_number, run_command
from lib.json_file import write_json

if TYPE_CHECKING:
    from lib.measure.layers import Layer

Row = dict[str, Any]
COLUMNS = {
    "layer": ("layer", ""),
    "count": ("count", "d"),
    "gflop": ("GFLOP", ".1f"),
    "mib": ("MiB", ".0f"),
    "bound": ("bound by", ""),
    "limit_us": ("limit us", ".0f"),
    "served_us": ("served us", ".0f"),
    "of_limit": ("of limit", ".0%"),
    "padded_us": ("padded us", ".0f"),
    "tiles_us": ("other tiles us", ".0f"),
    "fp16_us": ("fp16 plans us", ".0f"),
    "int8_us": ("INT8 us", ".0f"),
    "int8_fp16_us": ("INT8, fp16 out us", ".0f"),
    "int8_gain": ("INT8 x", ".2f"),
    "best_padding": ("best padding", ""),
}


# Keys of a row with times of fp16.
FP16_TIMES = ("served_us", "padded_us", "tiles_us", "fp16_us")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON and Markdown."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    import torch

    from lib.devices import open_device
    from lib.measure.environment import environment
    from lib.measure.layer_timing import time_variant, variants_of
    from lib.measure.process_pool import run_tasks
    from lib.measure.roofline import measure_ceilings, roofline_row
    from lib.measure.timing import format_table

    device = open_device(arguments.device)
    if device.type != "cuda":
        raise ScriptError(f"the device is {device}; layers are measured on a CUDA device")
    layers = _layers(arguments)
    ceilings = measure_ceilings(device)
    torch.cuda.empty_cache()  # for the processes that measure
    facts = (
        {"variant": arguments.variant, "batch_size": arguments.batch_size}
        | environment()
        | ceilings.as_facts()
    )
    rows = [roofline_row(layer, ceilings) for layer in layers]
    variants = [variant for layer in layers for variant in variants_of(layer.work)]
    if importlib.util.find_spec("cudnn") is None:
        print("nvidia-cudnn-frontend is not installed: neither other plans nor INT8 are measured")
        variants = [variant for variant in variants if variant.kind != "plans"]
    # First what is served, so that a short budget still gives the table of the present state.
    variants.sort(key=lambda variant: ["served", "padded", "tiles", "plans"].index(variant.kind))
    measured: list[Row] = []
    function = functools.partial(time_variant, device=device, plan_modes=arguments.plan_modes)
    for variant, row, error in run_tasks(function, variants, arguments.processes, arguments.budget):
        found = row or {"layer": variant.layer, "kind": variant.kind, "variant": variant.name, "error": error}
        measured.append(found)
        if arguments.verbose:
            print({key: value for key, value in found.items() if key != "layer"}, flush=True)
        _write(arguments, facts, summarised(rows, measured), measured)
    table = summarised(rows, measured)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(format_table(table, COLUMNS))
    print("\n".join(totals(table)))
    failed = [row for row in measured if "error" in row]
    for row in failed:
        print(f"not measured: {row['layer']}: {row['variant']}: {row['error']}")


def _layers(arguments: argparse.Namespace) -> list[Layer]:
    """The layers of the fused network as it is before padding: padding is one of the alternatives."""
    from lib.measure.layers import distinct_layers

    from damoyolo.cuda.fuse import FuseOptions, fuse
    from damoyolo.model.damoyolo import build_model
    from damoyolo.model.variants import get_variant

    variant = get_variant(arguments.variant)
    height, width = arguments.input_size or variant.input_size_hw
    model = build_model(variant, arguments.classes, folded=True)
    fused = fuse(model, FuseOptions(channel_padding=arguments.padded))
    return distinct_layers(fused, (arguments.batch_size, 3, height, width))


def summarised(rows: Sequence[Row], measured: Sequence[Row]) -> list[Row]:
    """The row of each layer with the fastest of each kind of measurement."""
    columns = {
        "served": "served_us",
        "padded": "padded_us",
        "tiles": "tiles_us",
    }
    table = []
    for row in rows:
        found: Row = dict(row)
        best_padded = None
        for each in measured:
            if each["layer"] != row["layer"] or "us" not in each:
                continue
            key = columns.get(each["kind"]) or plan_column(each["variant"])
            if each["us"] < found.get(key, float("inf")):
                found[key] = each["us"]
                if key == "padded_us":
                    best_padded = next(word for word in each["variant"].split() if "->" in word)
        if "served_us" in found:
            found["of_limit"] = found["limit_us"] / found["served_us"]
            if best_padded and found["padded_us"] < found["served_us"]:
                found["best_padding"] = best_padded
            fastest = min(found[key] for key in FP16_TIMES if key in found)
            if "int8_us" in found:
                found["int8_gain"] = fastest / found["int8_us"]
        table.append(found)
    return table


def plan_column(variant: str) -> str:
    """The column of a measurement of cuDNN's plans, whose name begins with its types."""
    if "float16->" in variant:
        return "fp16_us"
    return "int8_us" if "int8->int8" in variant else "int8_fp16_us"


def totals(table: Sequence[Row]) -> list[str]:
    """Sums over all layers, each as often as it occurs, in milliseconds."""
    choices = {
        "limit": ("limit_us",),
        "as served": ("served_us",),
        "with padding where it is faster": ("served_us", "padded_us"),
        "with other tiles, too": ("served_us", "padded_us", "tiles_us"),
        "best fp16": FP16_TIMES,
        "best of fp16 and INT8, without conversions": (*FP16_TIMES, "int8_us"),
    }
    lines = []
    for name, keys in choices.items():
        known = [row for row in table if any(key in row for key in keys)]
        total_us = sum(row["count"] * min(row[key] for key in keys if key in row) for row in known)
        lines.append(f"{name}: {total_us / 1e3:.3f} ms ({len(known)} of {len(table)} layers)")
    return lines


def _write(
    arguments: argparse.Namespace, facts: Mapping[str, Any], table: Sequence[Row], measured: Any
) -> None:
    if arguments.json:
        write_json(arguments.json, {"facts": facts, "layers": table, "measured": measured})
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(markdown_table(table) + "\n\n" + "\n".join(totals(table)) + "\n")


def markdown_table(table: Sequence[Row]) -> str:
    """The table in Markdown, with an empty cell for what was not measured."""
    lines = [
        "| " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in table:
        cells = [format(row[key], form) if key in row else "" for key, (_, form) in COLUMNS.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("--variant", default="S", help="of the network (%(default)s)")
    parser.add_argument("--classes", type=positive_int, default=3, help="(%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="(%(default)s)")
    parser.add_argument(
        "--input-size",
        type=positive_int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the network in pixels, multiples of 32 (the variant's own)",
    )
    parser.add_argument("--padded", action="store_true", help="start from the network with padded channels")
    parser.add_argument("--device", help="cuda[:index]")
    parser.add_argument("--processes", type=positive_int, default=8, help="that compile plans (%(default)s)")
    parser.add_argument(
        "--plan-modes",
        default="ABF",
        help="cuDNN's heuristics whose plans are tried: A, B, F for fallback (%(default)s)",
    )
    parser.add_argument(
        "--budget", type=positive_number, default=600.0, help="seconds for all measurements (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    parser.add_argument("--verbose", action="store_true", help="print each measurement")
    return parser


if __name__ == "__main__":
    sys.exit(main())
