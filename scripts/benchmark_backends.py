"""Measure models, backends and precisions in turn, and print one table.

    python scripts/benchmark_backends.py --voc ../shared/bccd --jsonl output/backends.jsonl
    python scripts/benchmark_backends.py --weights s.pth t.pth --class-names names.txt --onnx s_int8.onnx

Builds an archive (scripts/build_archive.py, scripts/build_tensorrt.py) for each combination of weights,
backend and precision, and measures it in a process of its own. Those of one model take turns. Rows that
cannot run on this machine are listed with the reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import ScriptError, command_parser, positive_int, positive_number, run_command
from lib.measure.backend_rows import LIBRARIES, Machine, reason_not_run, rows_of
from lib.paths import DEMO_WEIGHTS, SAMPLE_IMAGES

from damoyolo.errors import DamoYoloError

if TYPE_CHECKING:
    from lib.measure.backend_archives import Model
    from lib.measure.backend_process import Method

DEFAULT_BATCH_SIZES = {"cpu": (1, 4, 8), "cuda": (1, 8, 32, 64)}
COMPARED_IMAGES = 8  # number of images whose raw predictions are compared with float32
Row = dict[str, Any]
COLUMNS = {
    "variant": ("model", ""),
    "backend": ("backend", ""),
    "ap": ("AP", ".4f"),
    "score_difference": ("score diff", ".1e"),
    "box_difference_px": ("box diff px", ".2g"),
    "detector_ms": ("ms at batch 1", ".1f"),
    "network_ms": ("network ms", ".1f"),
    "images_per_s": ("images/s", ".1f"),
    "best_images_per_s": ("at best batch", ".1f"),
    "best_batch_size": ("best batch", "d"),
    "resident_mib": ("MiB", ".0f"),
    "peak_mib": ("peak MiB", ".0f"),
    "device_mib": ("GPU MiB", ".0f"),
    "start_s": ("start s", ".1f"),
    "archive_mb": ("archive MB", ".1f"),
    "not_run": ("not run", ""),
}


def measure_model(model: Model, device: str, reasons: Mapping[str, str | None], method: Method) -> list[Row]:
    """A row for each backend of a device, in table order.

    reasons: why a row is not run, or None, by row name.
    """
    from lib.archive.reader import unpacked
    from lib.measure.backend_archives import build_row_archive
    from lib.measure.backend_process import measure_in_turn, write_reference

    rows: dict[str, Row] = {}
    folders: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="backends-") as name, ExitStack() as stack:
        for row in rows_of(device):
            rows[row.name] = {"variant": model.variant, "device": device, "backend": row.name}
            if (reason := reasons[row.name]) is not None:
                rows[row.name]["not_run"] = reason
                continue
            say(f"{model.variant} {row.name}: building")
            largest = max(COMPARED_IMAGES, *method.batch_sizes)
            try:
                archive = build_row_archive(
                    model, row, Path(name) / f"archive-{len(rows)}", largest, method.voc
                )
            except (ScriptError, DamoYoloError) as error:
                say(f"{row.name}: {error}")
                rows[row.name]["not_run"] = "archive not built"
                continue
            rows[row.name]["archive_mb"] = archive.stat().st_size / 1e6
            folders[row.name] = stack.enter_context(unpacked(archive))
        if folders:
            reference = Path(name) / "reference.pt"
            write_reference(reference, next(iter(folders.values())), device, compared_images(method))
            for backend, figures in measure_in_turn(folders, device, method, reference, say).items():
                rows[backend] |= figures
    return list(rows.values())


def compared_images(method: Method) -> list[bytes]:
    """The images whose raw predictions are compared: of the data set, if there is one."""
    from lib.accuracy.datasets import read_voc
    from lib.images import read_images

    if method.voc is None:
        return read_images(method.images)[:COMPARED_IMAGES]
    images = read_voc(method.voc, "test").images[:COMPARED_IMAGES]
    return [image.path.read_bytes() for image in images]


def say(message: str) -> None:
    """Report progress or a failure on stderr."""
    print(f"benchmark_backends: {message}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write JSON rows."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    import torch

    from lib.images import read_images
    from lib.measure.backend_archives import read_models
    from lib.measure.backend_process import Method
    from lib.measure.environment import environment
    from lib.measure.timing import append_json_rows, format_table
    from lib.packaging.class_names import DEMO_CLASS_NAMES, read_class_names

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = Machine.here()
    device = arguments.device or ("cuda" if machine.has_gpu else "cpu")
    method = Method(
        batch_sizes=tuple(sorted({1, *(arguments.batch_sizes or DEFAULT_BATCH_SIZES[device])})),
        rounds=arguments.rounds,
        slice_s=arguments.slice_s,
        images=arguments.images,
        voc=arguments.voc,
        threads=arguments.threads,
    )
    # Find mistakes now rather than after minutes of building.
    read_images(method.images)
    compared_images(method)
    class_names = read_class_names(arguments.class_names) if arguments.class_names else DEMO_CLASS_NAMES
    models = read_models(arguments.weights, class_names, arguments.onnx)
    facts = environment()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    facts["method"] = {
        "batch_sizes": method.batch_sizes,
        "rounds": method.rounds,
        "slice_s": method.slice_s,
        "images": method.images.resolve().name,
        "data_set": None if method.voc is None else method.voc.resolve().name,
    }
    rows: list[Row] = []
    for model in models:
        reasons = {
            row.name: reason_not_run(row, machine, has_int8_file=model.int8_file is not None)
            if row.backend in arguments.backends
            else "left out"
            for row in rows_of(device)
        }
        rows += (found := measure_model(model, device, reasons, method))
        if arguments.jsonl:
            append_json_rows(arguments.jsonl, found, facts)
    columns = {key: each for key, each in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    print(format_table(rows, columns))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__, {"--pictures": "--images", "--engines": "--backends", "--json": "--jsonl"}
    )
    parser.add_argument(
        "--weights", nargs="+", default=[str(DEMO_WEIGHTS)], help="one file of each variant (the demo's)"
    )
    parser.add_argument("--class-names", type=Path, help="of all --weights (the demo's)")
    parser.add_argument(
        "--onnx",
        nargs="+",
        type=Path,
        default=[],
        help="INT8 files of scripts/quantize.py, one of each variant",
    )
    parser.add_argument("--voc", type=Path, help="data set in Pascal VOC format for the AP of each row")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(a GPU if there is one)")
    parser.add_argument(
        "--backends", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES), help="to measure (all)"
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive_int, help="in addition to 1 (CPU: 4 8, GPU: 8 32 64)"
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="turns of each row (%(default)s)")
    parser.add_argument(
        "--slice-s", type=positive_number, default=0.3, help="seconds of a turn (%(default)s)"
    )
    parser.add_argument("--threads", type=positive_int, help="of every backend (PyTorch's default)")
    parser.add_argument(
        "--images", type=Path, default=SAMPLE_IMAGES, help="folder of JPEG files for the timing"
    )
    parser.add_argument(
        "--jsonl", type=Path, metavar="FILE", help="append a line of JSON for each row of the table"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
