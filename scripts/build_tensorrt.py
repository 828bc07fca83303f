"""Build a TensorRT engine from an ONNX file, compare it with PyTorch, and only then write its archive.

python scripts/export_onnx.py --output damoyolo.onnx
python scripts/build_tensorrt.py --onnx damoyolo.onnx --precision fp16 --voc DIR

An engine runs only on the GPU and the TensorRT version that built it: run this on the machine that serves.

Prints the comparison, and then what was built.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib.accuracy.parity_options import (
    Evidence,
    add_parity_arguments,
    check_parity,
    read_evidence,
    require_enough,
)
from lib.cli import ScriptError, add_model, command_parser, positive_int, run_command
from lib.packaging.arguments import add_weights_arguments
from lib.paths import MODEL_STORE

if TYPE_CHECKING:
    from lib.packaging.builder import ArchiveReport, ArchiveRequest
    from lib.tensorrt.builder import OnnxNetwork


def main(argv: Sequence[str] | None = None) -> int:
    """Build, compare, archive."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    from lib.tensorrt.builder import read_network

    network = read_network(arguments.onnx, arguments.precision)
    # Before minutes of building: everything that can be refused already.
    require_weights(network, arguments)
    evidence = read_evidence(arguments)
    require_enough(evidence, network.metadata.precision)
    report = build_compared_archive(network, arguments, evidence)
    print(f"{report.path}: DAMO-YOLO-{report.variant}, {report.num_classes} classes, TensorRT")
    print(f"content SHA-256 {report.digest}")


def require_weights(network: OnnxNetwork, arguments: argparse.Namespace) -> None:
    """Refuse an ONNX file that was made from other weights.

    Raises:
        ScriptError, CheckpointError: the weights differ, or cannot be read.
    """
    from lib.packaging.weights import fetch_weights, folded_network

    from damoyolo.backends.onnx_metadata import weights_digest

    weights = fetch_weights(arguments.weights, arguments.sha256)
    model = folded_network(weights, network.metadata.variant, network.metadata.num_classes)
    if weights_digest(model) != network.metadata.weights_digest:
        raise ScriptError(
            f"{arguments.onnx} was not made from {arguments.weights}; give --weights those that it was "
            "exported from, or export it again"
        )


def build_compared_archive(
    network: OnnxNetwork, arguments: argparse.Namespace, evidence: Evidence
) -> ArchiveReport:
    """Build engine and archive in a temporary folder, compare that archive, then move it into place.

    Raises:
        ScriptError, DamoYoloError, OSError: there is no new archive; a former one is untouched.
    """
    import torch

    from lib.packaging.builder import build_archive
    from lib.tensorrt.builder import build_engine

    from damoyolo.backends.tensorrt import ENGINE_FILE, METADATA_FILE, Gpu
    from damoyolo.model.variants import get_variant

    device = torch.device(arguments.device)
    height, width = arguments.input_size or get_variant(network.metadata.variant).input_size_hw
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=arguments.output_dir) as name:
        folder = Path(name)
        plan, metadata = build_engine(network, Gpu(device), (height, width), arguments.profiles)
        (folder / ENGINE_FILE).write_bytes(plan)
        (folder / METADATA_FILE).write_text(metadata.to_json() + "\n", encoding="utf-8")
        request = _archive_request(network, arguments, folder, (height, width))
        built = build_archive(
            dataclasses.replace(request, backend_files=(folder / ENGINE_FILE, folder / METADATA_FILE))
        )
        smallest = [before + 1 for before in (0, *arguments.profiles[:-1])]
        bounds = sorted({*smallest, *arguments.profiles})
        check_parity(built.path, device, bounds, arguments, evidence)
        path = arguments.output_dir / built.path.name
        built.path.replace(path)
    return dataclasses.replace(built, path=path)


def _archive_request(
    network: OnnxNetwork, arguments: argparse.Namespace, folder: Path, size_hw: tuple[int, int]
) -> ArchiveRequest:
    from lib.packaging.builder import ArchiveRequest

    return ArchiveRequest(
        weights=arguments.weights,
        sha256=arguments.sha256,
        variant=network.metadata.variant,
        class_names=network.metadata.class_names,
        model_name=arguments.model,
        version=arguments.version,
        output_dir=folder / "archive",
        model_settings={
            # A smaller batch would never use the largest profile.
            "batchSize": arguments.batch_size or arguments.profiles[-1],
            "minWorkers": arguments.workers,
            "maxWorkers": arguments.workers,
        },
        serving={"backend": "tensorrt", "input_size_hw": list(size_hw)},
    )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        {
            "--pictures": "--images",
            "--coco-pictures": "--coco-images",
            "--batch-ranges": "--profiles",
            "--model-name": "--model",
            "--report": "--json",
        },
    )
    parser.add_argument(
        "--onnx", type=Path, required=True, help="raw predictions, in float32 or quantised to int8"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "fp16"), help="for a float32 file (default: that of the file)"
    )
    parser.add_argument(
        "--profiles",
        type=positive_int,
        nargs="+",
        default=[1, 8, 32],
        metavar="LARGEST",
        help="largest batch size of each optimisation profile, ascending (1 8 32)",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, help="most requests that share a batch (the last of --profiles)"
    )
    parser.add_argument("--workers", type=positive_int, default=1, help="(%(default)s)")
    parser.add_argument(
        "--input-size",
        type=positive_int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="network input in pixels, multiples of 32 (the variant's)",
    )
    parser.add_argument("--device", default="cuda", help="cuda[:index] (%(default)s)")
    add_weights_arguments(parser)
    add_model(parser)
    parser.add_argument("--version", default="1.0")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", default=MODEL_STORE, help="(%(default)s)")
    add_parity_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
