"""Writes the table of models, backends and precisions into docs/backends.md, measured on this machine.

    python scripts/benchmark_backends.py --voc ../shared/bccd
    python scripts/benchmark_backends.py --weights s.pth t.pth --class-names names.txt --onnx s_int8.onnx

For each of the weights, backends and precisions an archive is built (scripts/build_archive.py) and measured
in a process of its own. Those of one model take turns. On a machine with a GPU the GPU's section is written,
else the CPU's; the other one stays. Rows that cannot run here are listed with the reason. Rows of the same
archive, machine and method are taken from the JSON file if it has them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.accuracy.datasets import DatasetError, read_voc
from lib.archive.reader import unpacked
from lib.cli import ScriptError, positive_int, positive_seconds
from lib.images import read_images
from lib.measure.backend_document import DocumentError, has_figures, section_text, write_section
from lib.measure.backend_process import Method, measure_in_turn, write_reference
from lib.measure.backend_rows import LIBRARIES, BackendRow, Machine, reason_not_run, rows_of
from lib.measure.environment import environment, installed_versions
from lib.measure.timing import append_json_rows
from lib.packaging.builder import ArchiveRequest, build_archive, content_digest
from lib.packaging.class_names import DEMO_CLASS_NAMES, read_class_names
from lib.packaging.weights import fetch_weights
from lib.paths import DEMO_WEIGHTS, PROJECT_DIR, SAMPLE_IMAGES

from damoyolo.errors import DamoYoloError
from damoyolo.model.checkpoint import load_checkpoint

DEFAULT_DOCUMENT = PROJECT_DIR / "docs" / "backends.md"
DEFAULT_ROWS = PROJECT_DIR / "output" / "benchmark_backends.jsonl"
DEFAULT_BATCH_SIZES = {"cpu": (1, 4, 8), "cuda": (1, 8, 32, 64)}
COMPARED_IMAGES = 8  # as many raw predictions are compared with float32
BUILD_TIMEOUT_S = 3600.0
Row = dict[str, Any]


class TableError(Exception):
    """The options do not fit together."""


@dataclass(frozen=True)
class Model:
    """Weights to measure, and the INT8 file that is made from them, if there is one."""

    weights: Path
    variant: str
    class_names: tuple[str, ...]
    int8_file: Path | None = None


@dataclass(frozen=True)
class Archive:
    """What was built for a row, or why it was not."""

    path: Path | None
    digest: str = ""
    reason: str = ""


def read_models(
    weights: Sequence[str], class_names: tuple[str, ...], onnx_files: Sequence[Path]
) -> list[Model]:
    """The weights with their variants; each INT8 file goes to the weights that it says it is made from.

    Raises:
        TableError: two of a variant, or a file that belongs to none of them.
        ScriptError, DamoYoloError: something cannot be read.
    """
    models: dict[str, Model] = {}
    for source in weights:
        path = fetch_weights(source)
        variant = load_checkpoint(path, num_classes=len(class_names)).variant.name
        if variant in models:
            raise TableError(
                f"{models[variant].weights} and {path} are both of variant {variant}; accepted is one each"
            )
        models[variant] = Model(path, variant, class_names)
    for file in onnx_files:
        from lib.onnx.export import read_onnx_metadata
        from lib.packaging.weights import folded_network

        from damoyolo.backends.onnx_metadata import weights_digest

        facts = read_onnx_metadata(file)
        model = models.get(facts.variant)
        if model is None or facts.weights_digest != weights_digest(
            folded_network(model.weights, model.variant, len(class_names))
        ):
            raise TableError(
                f"{file} is made from weights of variant {facts.variant} that are not among --weights"
            )
        if facts.precision != "int8":
            raise TableError(f"{file} is of precision {facts.precision}; accepted are int8 files")
        if model.int8_file is not None:
            raise TableError(f"{model.int8_file} and {file} are both INT8 files of variant {facts.variant}")
        models[facts.variant] = Model(model.weights, model.variant, class_names, file)
    return list(models.values())


def build_row_archive(model: Model, row: BackendRow, method: Method, folder: Path) -> Archive:
    """The archive of a row, in a new folder."""
    if row.backend == "tensorrt":
        return _build_tensorrt(model, row, method, folder)
    request = ArchiveRequest(
        weights=str(model.weights),
        variant=model.variant,
        class_names=model.class_names,
        onnx=model.int8_file if row.quantised else None,
        output_dir=folder,
        # Sizes up to it are recorded on CUDA.
        model_settings={"batchSize": max(COMPARED_IMAGES, *method.batch_sizes)},
        serving={"backend": row.backend, "precision": row.precision},
    )
    try:
        report = build_archive(request)
    except (ScriptError, DamoYoloError) as error:
        say(f"{row.name}: {error}")
        return Archive(None, reason="archive not built")
    return Archive(report.path, report.digest)


def _build_tensorrt(model: Model, row: BackendRow, method: Method, folder: Path) -> Archive:
    """By scripts/build_tensorrt.py, which proves the backend before there is an archive."""
    from lib.onnx.export import export_onnx
    from lib.packaging.weights import folded_network

    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(PROJECT_DIR / "scripts" / "build_tensorrt.py")]
    command += ["--weights", str(model.weights), "--output-dir", str(folder)]
    if row.quantised:
        command += ["--onnx", str(model.int8_file)]
    else:
        network = folded_network(model.weights, model.variant, len(model.class_names))
        export_onnx(network, folder / "network.onnx", class_names=model.class_names)
        command += ["--onnx", str(folder / "network.onnx"), "--precision", row.precision]
    if method.voc is not None:
        command += ["--voc", str(method.voc)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    path = folder / "damoyolo.mar"
    if built.returncode != 0 or not path.is_file():
        say(f"{row.name}: {built.stderr}")
        return Archive(None, reason="backend not built or refused")
    return Archive(path, content_digest(path))


def measured_before(file: Path, wanted: Mapping[str, Any]) -> Row | None:
    """The last row of a file of JSON lines with figures that has all these entries."""
    if not file.is_file():
        return None
    found = None
    for line in file.read_text(encoding="utf-8").splitlines():
        row: Row = json.loads(line)
        if "not_run" not in row and all(row.get(key) == value for key, value in wanted.items()):
            found = row
    return found


def measure_model(
    model: Model,
    device: str,
    reasons: Mapping[str, str | None],
    method: Method,
    machine: str,
    known: Path | None,
) -> list[Row]:
    """A row for each backend of a device, in the order of the table; new ones have "new": True.

    reasons: by the names of the rows, why they are not run, or None. known: file of rows measured before.
    """
    rows: dict[str, Row] = {}
    to_measure: dict[str, Path] = {}
    turn = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="backends-") as name, ExitStack() as stack:
        for row in rows_of(device):
            facts: Row = {"variant": model.variant, "device": device, "backend": row.name}
            if (reason := reasons[row.name]) is not None:
                rows[row.name] = {**facts, "not_run": reason}
                continue
            say(f"{model.variant} {row.name}: building")
            archive = build_row_archive(model, row, method, Path(name) / f"archive-{len(rows)}")
            if archive.path is None:
                rows[row.name] = {**facts, "not_run": archive.reason}
                continue
            facts |= {
                "archive_digest": archive.digest,
                "machine": machine,
                "method": method.to_mapping(),
            }
            before = None if known is None else measured_before(known, facts)
            if before is not None:
                rows[row.name] = before
                continue
            size_mb = archive.path.stat().st_size / 1e6
            rows[row.name] = {**facts, "archive_mb": size_mb, "turn": turn, "new": True}
            to_measure[row.name] = stack.enter_context(unpacked(archive.path))
        if to_measure:
            reference = Path(name) / "reference.pt"
            write_reference(reference, next(iter(to_measure.values())), device, compared_images(method))
            for backend, figures in measure_in_turn(to_measure, device, method, reference, say).items():
                rows[backend] |= figures
    return list(rows.values())


def compared_images(method: Method) -> list[bytes]:
    """The images whose raw predictions are compared: of the data set, if there is one."""
    if method.voc is None:
        return read_images(method.images)[:COMPARED_IMAGES]
    images = read_voc(method.voc, "test").images[:COMPARED_IMAGES]
    return [image.path.read_bytes() for image in images]


def machine_line(device: str) -> str:
    """Hardware and versions, in words."""
    facts, versions = environment(), installed_versions()
    hardware = [f"{facts['cpu']}, {facts['cpu_threads']} threads"]
    names = ["torch", "torchvision", "onnxruntime"]
    if device == "cuda":
        hardware = [f"{facts['gpu']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}", *hardware]
        if importlib.util.find_spec("tensorrt") is not None:  # its package has several names
            versions["tensorrt"] = importlib.import_module("tensorrt").__version__
            names.append("tensorrt")
    else:
        names.append("openvino")
    software = [f"Python {versions['python']}"]
    software += [f"{name} {version}" for name in names if (version := versions[name]) is not None]
    return "; ".join([*hardware, ", ".join(software)])


def say(message: str) -> None:
    """Progress and failures go to stderr."""
    print(f"benchmark_backends: {message}", file=sys.stderr, flush=True)


def _run(arguments: argparse.Namespace) -> None:
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
    # Mistakes that would show after minutes only.
    has_figures(arguments.document, device)
    read_images(method.images)
    if method.voc is not None:
        read_voc(method.voc, "test")
    class_names = read_class_names(arguments.class_names) if arguments.class_names else DEMO_CLASS_NAMES
    models = read_models(arguments.weights, class_names, arguments.onnx)

    def reasons(model: Model, of_device: str) -> dict[str, str | None]:
        left_out = {
            row.name: "left out" for row in rows_of(of_device) if row.backend not in arguments.backends
        }
        return {
            row.name: left_out.get(row.name)
            or reason_not_run(row, machine, has_int8_file=model.int8_file is not None)
            for row in rows_of(of_device)
        }

    line = machine_line(device)
    sizes = ", ".join(map(str, method.batch_sizes))
    how = f"{line}; batch sizes {sizes}, medians of {method.rounds} rounds of {method.slice_s:g} s"
    rows: list[Row] = []
    for model in models:
        found = measure_model(
            model, device, reasons(model, device), method, line, None if arguments.fresh else arguments.json
        )
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        append_json_rows(arguments.json, [row for row in found if row.pop("new", False)], {})
        rows += found
    any_figures = any("not_run" not in row for row in rows)
    write_section(arguments.document, device, section_text(rows, device, how if any_figures else None))
    if not machine.has_gpu and not has_figures(arguments.document, "cuda"):
        absent: list[Row] = [
            {"variant": model.variant, "backend": name, "not_run": reason}
            for model in models
            for name, reason in reasons(model, "cuda").items()
        ]
        write_section(arguments.document, "cuda", section_text(absent, "cuda", None))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet, write the table and the JSON rows."""
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        _run(arguments)
    except (TableError, DocumentError, DatasetError, ScriptError, DamoYoloError, OSError) as error:
        print(f"benchmark_backends: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.document} written, rows in {arguments.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", nargs="+", default=[str(DEMO_WEIGHTS)], help="one file a variant (the demo's)"
    )
    parser.add_argument("--class-names", type=Path, help="of all --weights (default: the demo's)")
    parser.add_argument(
        "--onnx", nargs="+", type=Path, default=[], help="INT8 files of scripts/quantize.py, one a variant"
    )
    parser.add_argument("--voc", type=Path, help="data set in Pascal-VOC form for the AP of each row")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="section to measure (a GPU where there is one)"
    )
    parser.add_argument(
        "--backends", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES), help="to measure (all)"
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive_int, help="beside 1 (CPU: 4 8, GPU: 8 32 64)"
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="turns of each row (%(default)s)")
    parser.add_argument(
        "--slice-s", type=positive_seconds, default=0.3, help="seconds of a turn (%(default)s)"
    )
    parser.add_argument("--threads", type=positive_int, help="of every backend (default: PyTorch's own)")
    parser.add_argument(
        "--images",
        type=Path,
        default=SAMPLE_IMAGES,
        help="folder of JPEGs for the timing",
    )
    parser.add_argument("--document", type=Path, default=DEFAULT_DOCUMENT, help="(%(default)s)")
    parser.add_argument("--json", type=Path, default=DEFAULT_ROWS, help="rows measured (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the JSON file holds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
