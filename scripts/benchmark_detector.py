"""Measure how fast the network and the detector are in this process, technique by technique.

    python scripts/benchmark_detector.py
    python scripts/benchmark_detector.py --detector --precisions fp16 fp32

By default measures the network, from pixels on the device to raw predictions there. Each step adds one
technique; all steps of a batch size take turns in one run, and each is compared with float32: largest
difference of a score and of a box, and AP if a data set is given (--voc). --detector measures the whole
detector of an archive, from JPEG files to detections on the host.

Prints a table with a row for each step or precision.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import ScriptError, command_parser, positive_int, run_command
from lib.paths import DEMO_ARCHIVE, DEMO_WEIGHTS, SAMPLE_IMAGES

if TYPE_CHECKING:
    import torch

    from lib.measure.ablation import AblationStep

PEAK_TFLOPS = 790.0  # dense 16-bit matrix products, measured on an H200; --peak-tflops for another GPU
Row = dict[str, Any]
ABLATION_COLUMNS = {
    "step": ("step", ""),
    "batch_size": ("batch", "d"),
    "ms": ("ms", ".3f"),
    "images_per_s": ("images/s", ".0f"),
    "times_baseline": ("x baseline", ".2f"),
    "peak_mib": ("peak MiB", ".0f"),
    "score_difference": ("score diff", ".1e"),
    "box_difference_px": ("box diff px", ".2f"),
    "ap": ("AP", ".4f"),
    "peak_share": ("of peak", ".1%"),
}
DETECTOR_COLUMNS = {
    "backend": ("backend", ""),
    "precision": ("precision", ""),
    "batch_size": ("batch", "d"),
    "network_ms": ("network ms", ".2f"),
    "network_images_per_s": ("images/s", ".1f"),
    "detector_ms": ("detector ms", ".2f"),
    "detector_images_per_s": ("images/s", ".1f"),
}


def measure_network(
    arguments: argparse.Namespace, images: Sequence[bytes], device: torch.device
) -> list[Row]:
    """One row for each batch size and step of the ablation."""
    from lib.accuracy.datasets import read_voc
    from lib.archive.reader import load_detector
    from lib.images import cycled
    from lib.measure.ablation import ablation_steps, ap_of_network, flop_per_image, measure_ablation
    from lib.packaging.class_names import DEMO_CLASS_NAMES, read_class_names

    names = read_class_names(arguments.class_names) if arguments.class_names else DEMO_CLASS_NAMES
    steps = ablation_steps(Path(arguments.weights), len(names), device, compile_too=arguments.compile)
    if arguments.steps:
        steps = _chosen(steps, arguments.steps)
    detector = load_detector(arguments.archive, device, precision="fp32")
    aps: dict[str, float] = {}
    if arguments.voc:
        dataset = read_voc(arguments.voc, "test")
        aps = {step.name: ap_of_network(step.build(), detector, dataset) for step in steps}
    rows = []
    for batch_size in arguments.batch_sizes:
        rows += measure_ablation(steps, detector.preprocessor.prepare(cycled(images, batch_size)).pixels)
    flop = flop_per_image(Path(arguments.weights), len(names))
    for row in rows:
        row["ap"] = aps.get(row["step"])
        if "images_per_s" in row and device.type == "cuda":
            row["peak_share"] = row["images_per_s"] * flop / arguments.peak_tflops / 1e12
    return rows


def _chosen(steps: Sequence[AblationStep], names: Sequence[str]) -> list[AblationStep]:
    """The steps of these names, and the first, with which all are compared.

    Raises:
        ScriptError: there is no step of a name.
    """
    known = [step.name for step in steps]
    if unknown := [name for name in names if name not in known]:
        raise ScriptError(f"--steps names {', '.join(unknown)}; the steps here are {', '.join(known)}")
    return [step for step in steps if step is steps[0] or step.name in names]


def measure_detector(
    arguments: argparse.Namespace, images: Sequence[bytes], device: torch.device
) -> list[Row]:
    """One row for each batch size and precision of the whole detector."""
    from lib.archive.reader import load_detector
    from lib.measure.calls import batch_calls
    from lib.measure.timing import interleaved_medians_s

    from damoyolo.backends.precision import PRECISIONS_OF_DEVICE

    precisions = arguments.precisions or PRECISIONS_OF_DEVICE[device.type]
    detectors = {
        precision: load_detector(arguments.archive, device, precision=precision) for precision in precisions
    }
    rows = []
    for batch_size in arguments.batch_sizes:
        calls = {
            f"{part} {precision}": call
            for precision, detector in detectors.items()
            for part, call in batch_calls(detector, images, batch_size).items()
        }
        medians_s = interleaved_medians_s(calls, device)
        for precision, detector in detectors.items():
            network_s, detector_s = medians_s[f"network {precision}"], medians_s[f"detector {precision}"]
            rows.append(
                {
                    "backend": detector.pipeline.name,
                    "precision": precision,
                    "batch_size": batch_size,
                    "network_ms": network_s * 1e3,
                    "detector_ms": detector_s * 1e3,
                    "network_images_per_s": batch_size / network_s,
                    "detector_images_per_s": batch_size / detector_s,
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON rows."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:

    from lib.devices import open_device
    from lib.images import read_images
    from lib.measure.environment import environment
    from lib.measure.timing import append_json_rows, format_table

    device = open_device(arguments.device)
    measure = measure_detector if arguments.detector else measure_network
    rows = measure(arguments, read_images(arguments.images), device)
    facts = environment()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(format_table(rows, DETECTOR_COLUMNS if arguments.detector else ABLATION_COLUMNS))
    if arguments.jsonl:
        append_json_rows(arguments.jsonl, rows, facts)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, {"--pictures": "--images", "--json": "--jsonl"})
    parser.add_argument("--detector", action="store_true", help="the whole detector instead of the network")
    parser.add_argument("--archive", type=Path, default=DEMO_ARCHIVE)
    parser.add_argument("--weights", default=str(DEMO_WEIGHTS), help="of the network, as trained")
    parser.add_argument("--class-names", type=Path, help="of --weights (the demo's)")
    parser.add_argument("--device", help="cpu or cuda[:index] (a GPU if there is one)")
    parser.add_argument("--precisions", nargs="+", help="of --detector (all of the device)")
    parser.add_argument("--batch-sizes", nargs="+", type=positive_int, default=[1, 8, 32])
    parser.add_argument("--images", type=Path, default=SAMPLE_IMAGES, help="folder of JPEG files")
    parser.add_argument("--voc", type=Path, help="data set in Pascal VOC format for the AP of each step")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these, by name, and the first")
    parser.add_argument("--compile", action="store_true", help="add a step with torch.compile")
    parser.add_argument(
        "--peak-tflops", type=float, default=PEAK_TFLOPS, help="of the GPU, for 16-bit matrix products"
    )
    parser.add_argument(
        "--jsonl", type=Path, metavar="FILE", help="append a line of JSON for each row of the table"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
