"""Builds a TensorRT engine from an ONNX file, proves it against PyTorch, and only then writes its archive.

python scripts/export_onnx.py --output damoyolo.onnx
python scripts/build_tensorrt.py --onnx damoyolo.onnx --precision fp16 --voc DIR

An engine belongs to the GPU and to the TensorRT that built it: run this on the machine that is to serve.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from lib.accuracy.parity_options import add_parity_arguments, check_parity, read_evidence, require_enough
from lib.cli import ScriptError, positive_int
from lib.onnx.float16 import HalfError, to_half
from lib.packaging.builder import ArchiveError, ArchiveReport, ArchiveRequest, build_archive
from lib.packaging.weights import WeightsError, fetch_weights, folded_network
from lib.paths import DEMO_WEIGHTS, MODEL_STORE, PROJECT_DIR
from lib.tensorrt.builder import EngineBuildError, EngineRequest, OnnxNetwork, build_engine, read_onnx

from damoyolo.backends.onnx_metadata import weights_digest
from damoyolo.backends.tensorrt import Gpu
from damoyolo.backends.tensorrt_metadata import ENGINE_FILE, METADATA_FILE, BatchRange
from damoyolo.errors import DamoYoloError
from damoyolo.model.variants import get_variant

DEFAULT_RANGES = (BatchRange(1, 1), BatchRange(2, 8), BatchRange(9, 32))
DEFAULT_TIMING_CACHE = PROJECT_DIR / ".cache" / "tensorrt-timing.bin"
ERRORS = (
    EngineBuildError,
    HalfError,
    ScriptError,
    ArchiveError,
    WeightsError,
    DamoYoloError,
    OSError,
)


def batch_range(text: str) -> BatchRange:
    """SMALLEST-LARGEST, or one batch size."""
    smallest, _, largest = text.partition("-")
    return BatchRange(positive_int(smallest), positive_int(largest or smallest))


def in_precision(network: OnnxNetwork, precision: str | None, folder: Path) -> OnnxNetwork:
    """The network in the precision asked for, None being the file's own; a float16 copy goes into `folder`.

    Raises:
        EngineBuildError, HalfError: this file cannot be brought into it.
    """
    if precision in (None, network.facts.precision):
        return network
    if (network.facts.precision, precision) != ("fp32", "fp16"):
        raise EngineBuildError(
            f"{network.path} is of precision {network.facts.precision}, asked for is {precision}; a float32 "
            "file gives fp32 and fp16, an int8 engine needs a quantised file"
        )
    half = folder / "half.onnx"
    onnx.save(to_half(onnx.load(network.path)), half)
    return dataclasses.replace(read_onnx(half), sha256=network.sha256)


def require_weights(network: OnnxNetwork, archive: ArchiveRequest) -> None:
    """Refuse, before minutes of building, an ONNX file that was made from other weights.

    Raises:
        EngineBuildError: they differ. WeightsError, CheckpointError: the weights cannot be had or do not fit.
    """
    weights = fetch_weights(archive.weights, archive.sha256)
    model = folded_network(weights, network.facts.variant, network.facts.num_classes)
    if weights_digest(model) != network.facts.weights_digest:
        raise EngineBuildError(
            f"{network.path} was not made from {archive.weights}; give --weights those that it was exported "
            "from, or export it anew"
        )


def build_proven_archive(
    network: OnnxNetwork,
    engine: argparse.Namespace,
    archive: ArchiveRequest,
    device: torch.device,
) -> ArchiveReport:
    """Engine, archive in a folder of its own, comparison of that very archive; then it takes its place.

    engine: the options of this script.

    Raises:
        One of ERRORS: there is no archive; what was there before is untouched.
    """
    # Ahead of minutes of building: all that can be refused beforehand.
    require_weights(network, archive)
    evidence = read_evidence(engine)
    require_enough(evidence, engine.precision or network.facts.precision)
    best_size_hw = engine.input_size or get_variant(network.facts.variant).input_size_hw
    archive.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=archive.output_dir) as name:
        folder = Path(name)
        request = EngineRequest(
            network=in_precision(network, engine.precision, folder),
            batch_ranges=tuple(engine.batch_ranges),
            input_size_hw=best_size_hw,
            min_size_hw=engine.min_input_size or best_size_hw,
            max_size_hw=engine.max_input_size or best_size_hw,
            timing_cache=None if engine.no_timing_cache else engine.timing_cache,
            workspace_mib=engine.workspace_mib,
        )
        plan, metadata = build_engine(request, Gpu(device))
        (folder / ENGINE_FILE).write_bytes(plan)
        (folder / METADATA_FILE).write_text(metadata.to_json() + "\n", encoding="utf-8")
        unproven = dataclasses.replace(
            archive,
            variant=network.facts.variant,
            class_names=network.facts.class_names,
            output_dir=folder / "archive",
            serving={**archive.serving, "backend": "tensorrt", "input_size_hw": list(best_size_hw)},
            backend_files=(folder / ENGINE_FILE, folder / METADATA_FILE),
        )
        built = build_archive(unproven)
        bounds = sorted({size for each in request.batch_ranges for size in each})
        check_parity(built.path, device, bounds, engine, evidence)
        path = archive.output_dir / built.path.name
        built.path.replace(path)
    return dataclasses.replace(built, path=path)


def main(argv: Sequence[str] | None = None) -> int:
    """Build, prove, archive."""
    arguments = _parser().parse_args(argv)
    for name in ("input_size", "min_input_size", "max_input_size"):
        if (size := getattr(arguments, name)) is not None:
            setattr(arguments, name, tuple(size))
    archive = ArchiveRequest(
        weights=arguments.weights,
        sha256=arguments.sha256,
        model_name=arguments.model_name,
        version=arguments.version,
        output_dir=arguments.output_dir,
        model_settings={
            # A smaller one would never use the largest profile.
            "batchSize": arguments.batch_size or max(last for _, last in arguments.batch_ranges),
            "minWorkers": arguments.workers,
            "maxWorkers": arguments.workers,
        },
    )
    try:
        report = build_proven_archive(
            read_onnx(arguments.onnx), arguments, archive, torch.device(arguments.device)
        )
    except ERRORS as error:
        print(f"build_tensorrt: {error}", file=sys.stderr)
        return 1
    print(f"{report.path}: DAMO-YOLO-{report.variant}, {report.num_classes} classes, TensorRT")
    print(f"content SHA-256 {report.digest}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size: dict[str, Any] = {"type": positive_int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("--onnx", type=Path, required=True, help="raw form, float32 or quantised to int8")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16"), help="of a float32 file (default: as the file is)"
    )
    parser.add_argument(
        "--batch-ranges",
        type=batch_range,
        nargs="+",
        default=DEFAULT_RANGES,
        metavar="FIRST-LAST",
        help="batch sizes, an optimisation profile each (1 2-8 9-32)",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, help="most requests that share a batch (end of the last range)"
    )
    parser.add_argument("--workers", type=positive_int, default=1, help="(%(default)s)")
    parser.add_argument("--input-size", **size, help="network input in pixels (the variant's)")
    parser.add_argument("--min-input-size", **size, help="smallest that it has to take (the same)")
    parser.add_argument("--max-input-size", **size, help="largest that it has to take (the same)")
    parser.add_argument(
        "--timing-cache", type=Path, default=DEFAULT_TIMING_CACHE, help="of measured kernels (%(default)s)"
    )
    parser.add_argument("--no-timing-cache", action="store_true", help="measure all kernels, keep nothing")
    parser.add_argument("--workspace-mib", type=positive_int, help="most scratch memory (TensorRT's default)")
    parser.add_argument("--device", default="cuda", help="cuda[:index] (%(default)s)")
    parser.add_argument("--weights", default=str(DEMO_WEIGHTS), help="those that the ONNX file was made from")
    parser.add_argument("--sha256", help="what the weights have to have, in hexadecimal")
    parser.add_argument("--model-name", default="damoyolo")
    parser.add_argument("--version", default="1.0")
    parser.add_argument("--output-dir", type=Path, default=MODEL_STORE)
    add_parity_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
