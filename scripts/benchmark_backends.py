"""How fast each engine runs the network on this machine's CPU, in this process.

    python scripts/benchmark_backends.py                              speed alone
    python scripts/benchmark_backends.py --voc ../shared/bccd         accuracy too
    python scripts/benchmark_backends.py --onnx quantised.onnx        a quantised file of the same weights

All engines take turns in one run. The network alone starts from pixels and ends with raw predictions; the
whole detector starts from JPEG files and ends with detections. Every row stands beside float32 in plain
PyTorch: largest difference of a score and of a likely box, AP where a data set is given.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import project_paths
from agreement import compare_decoded
from argument_types import positive_int
from backends_rows import LIBRARIES, REFERENCE, EngineRow, rows_of
from benchmark_detector import accuracy_of
from build_archive import DEMO_CLASS_NAMES, DEMO_WEIGHTS, read_class_names
from damoyolo.accelerate import WEIGHT_DTYPE
from damoyolo.backends import ONNX_FILE, open_backend
from damoyolo.boxes import decode_predictions
from damoyolo.config import ServingConfig
from damoyolo.detector import Detector
from damoyolo.errors import DamoYoloError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.structures import RawPredictions
from detection_dataset import DatasetError, DetectionDataset, read_voc
from evaluate import EvaluationError
from export_onnx import export_onnx, folded_network
from in_process import batch_calls, cycled, read_pictures
from measuring import Call, append_json_rows, environment, format_table, interleaved_medians_s

CPU = torch.device("cpu")
Network = Callable[[Tensor], RawPredictions]
Row = dict[str, Any]


@dataclass(frozen=True)
class Engine:
    """One row: how to make the network ready, and the library whose version it depends on."""

    name: str
    library: str
    open: Callable[[], Network]


class _CompiledNetwork:
    """The network through torch.compile, pixels and all; batch sizes are compiled one by one."""

    def __init__(self, model: DamoYolo, precision: str) -> None:
        self.dtype = WEIGHT_DTYPE.get(precision, torch.float32)
        self.model = torch.compile(
            model.to(self.dtype, memory_format=torch.channels_last),  # type: ignore[call-overload]
            dynamic=False,
        )

    def __call__(self, pixels: Tensor) -> RawPredictions:
        # Not under inference_mode, which the compiler guards against at every call.
        with torch.no_grad():
            images = pixels.to(self.dtype, memory_format=torch.channels_last)
            predictions: RawPredictions = self.model(images)
        return predictions


def cpu_engines(
    model: DamoYolo, class_names: Sequence[str], onnx_dir: Path, *, compile_too: bool, quantised: bool = False
) -> list[Engine]:
    """Every engine and precision of a CPU; the first is REFERENCE.

    model: folded, float32; every engine gets a copy. onnx_dir: folder with the ONNX form as ONNX_FILE.
    quantised: that file is an int8 one; only what differs by it is listed beside the reference.
    """

    def served(row: EngineRow) -> Engine:
        config = ServingConfig(
            variant=model.variant.name,
            class_names=tuple(class_names),
            backend=row.backend,
            precision=row.precision,
        )
        folder = onnx_dir if row.quantised or row.backend == "onnxruntime" else None
        return Engine(
            row.name,
            LIBRARIES[row.backend][0],
            lambda: open_backend(copy.deepcopy(model), config, CPU, folder),
        )

    def compiled(precision: str) -> Engine:
        return Engine(
            f"torch.compile {precision}",
            "torch",
            lambda: _CompiledNetwork(copy.deepcopy(model), precision),
        )

    engines = [served(row) for row in rows_of("cpu") if row.quantised == quantised or row.name == REFERENCE]
    if compile_too and not quantised:
        engines += [compiled("fp32"), compiled("bf16")]
    return engines


def measure_engines(
    engines: Sequence[Engine],
    detector: Detector,
    pictures: Sequence[bytes],
    batch_sizes: Sequence[int],
    rounds: int = 5,
    dataset: DetectionDataset | None = None,
) -> list[Row]:
    """One row an engine and batch size, in the order of the engines.

    detector: the plain one; its engine is exchanged for each in turn, and is back in its place afterwards.
    pictures: JPEG files. dataset: for the AP of each engine, in every row of it.
    """
    opened: dict[str, Network] = {}
    facts: dict[str, Row] = {}
    for engine in engines:
        started = time.perf_counter()
        opened[engine.name] = engine.open()
        facts[engine.name] = {
            "engine": engine.name,
            "library": f"{engine.library} {metadata.version(engine.library)}",
            "open_s": time.perf_counter() - started,
        }
        if dataset is not None:
            facts[engine.name]["ap"] = accuracy_of(opened[engine.name], detector, dataset)
    rows = []
    for batch_size in batch_sizes:
        pixels = detector.preprocessor.prepare(cycled(pictures, batch_size)).pixels.clone()
        expected = decode_predictions(opened[engines[0].name](pixels))
        calls: dict[str, Call] = {}
        for name, network in opened.items():
            calls[f"network {name}"] = functools.partial(network, pixels)
            calls[f"detector {name}"] = _with_engine(detector, network, pictures, batch_size)
        medians_s = interleaved_medians_s(calls, detector.device, rounds)
        for name, network in opened.items():
            agreement = compare_decoded(decode_predictions(network(pixels)), expected)
            network_s, detector_s = medians_s[f"network {name}"], medians_s[f"detector {name}"]
            rows.append(
                {
                    **facts[name],
                    "batch_size": batch_size,
                    "network_ms": network_s * 1e3,
                    "network_pictures_per_s": batch_size / network_s,
                    "detector_ms": detector_s * 1e3,
                    "detector_pictures_per_s": batch_size / detector_s,
                    "score_difference": agreement.score_difference,
                    "box_difference_px": agreement.box_difference_px,
                }
            )
    return rows


def _with_engine(detector: Detector, network: Network, pictures: Sequence[bytes], batch_size: int) -> Call:
    """A call of the whole detector with another network in the place of its own."""
    detect = batch_calls(detector, pictures, batch_size)["detector"]

    def call() -> None:
        before, detector.engine = detector.engine, network  # type: ignore[assignment]
        try:
            detect()
        finally:
            detector.engine = before

    return call


COLUMNS = {
    "engine": ("engine", ""),
    "batch_size": ("batch", "d"),
    "network_ms": ("network ms", ".0f"),
    "network_pictures_per_s": ("pictures/s", ".1f"),
    "detector_ms": ("detector ms", ".0f"),
    "detector_pictures_per_s": ("pictures/s", ".1f"),
    "score_difference": ("score diff", ".1e"),
    "box_difference_px": ("box diff px", ".1e"),
    "ap": ("AP", ".4f"),
    "open_s": ("open s", ".1f"),
}


def _measure(arguments: argparse.Namespace) -> list[Row]:
    class_names = read_class_names(arguments.class_names) if arguments.class_names else DEMO_CLASS_NAMES
    pictures = read_pictures(arguments.pictures)
    dataset = read_voc(arguments.voc, "test") if arguments.voc else None
    model = folded_network(Path(arguments.weights), None, len(class_names))
    with tempfile.TemporaryDirectory(prefix="engines-") as name:
        folder = Path(name)
        if arguments.onnx:
            (folder / ONNX_FILE).symlink_to(arguments.onnx.resolve())
        else:
            export_onnx(model, folder / ONNX_FILE, class_names=class_names)
        engines = cpu_engines(
            model,
            class_names,
            folder,
            compile_too=arguments.compile,
            quantised=arguments.onnx is not None,
        )
        plain = ServingConfig(
            variant=model.variant.name, class_names=class_names, backend="pytorch", precision="fp32"
        )
        detector = Detector(copy.deepcopy(model), plain, CPU)
        try:
            return measure_engines(
                engines, detector, pictures, arguments.batch_sizes, arguments.rounds, dataset
            )
        finally:
            detector.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    root = project_paths.PROJECT_DIR
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default=str(DEMO_WEIGHTS), help="file as trained (the demo's)")
    parser.add_argument("--class-names", type=Path, help="of --weights (default: the demo's)")
    parser.add_argument("--onnx", type=Path, help="quantised file of the same weights, measured instead")
    parser.add_argument("--batch-sizes", nargs="+", type=positive_int, default=[1, 8])
    parser.add_argument("--threads", type=positive_int, help="of every engine (default: PyTorch's own)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="turns of each engine (%(default)s)")
    parser.add_argument("--pictures", type=Path, default=root / "tests/data/smears", help="folder of JPEGs")
    parser.add_argument("--voc", type=Path, help="data set in Pascal-VOC form for the AP of each engine")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile too"
    )
    parser.add_argument("--json", type=Path, help="file that gets one JSON row a measurement")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        rows = _measure(arguments)
    except (DamoYoloError, DatasetError, EvaluationError, OSError) as error:
        print(f"benchmark_backends: {error}", file=sys.stderr)
        return 1
    facts = environment()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(format_table(rows, COLUMNS))
    if arguments.json:
        append_json_rows(arguments.json, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
