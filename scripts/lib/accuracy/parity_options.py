"""Options and report of the comparison with PyTorch, shared by two commands.

Imports no torch, so that commands can build their parsers quickly.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib.accuracy.datasets import DetectionDataset, read_dataset
from lib.accuracy.tolerances import TOLERANCES, Tolerances
from lib.cli import ScriptError
from lib.images import read_images
from lib.json_file import write_json
from lib.paths import SAMPLE_IMAGES

if TYPE_CHECKING:
    import torch


def add_parity_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison."""
    group = parser.add_argument_group(
        "comparison with PyTorch (tolerances: those of the precision by default)"
    )
    group.add_argument(
        "--images",
        type=Path,
        default=SAMPLE_IMAGES,
        metavar="DIR",
        help="JPEG files whose raw predictions are compared (%(default)s)",
    )
    dataset = group.add_mutually_exclusive_group()
    dataset.add_argument(
        "--voc", type=Path, metavar="DIR", help="data set in Pascal VOC format to compare AP on"
    )
    group.add_argument("--split", default="test", help="list in ImageSets/Main to use (%(default)s)")
    dataset.add_argument(
        "--coco", type=Path, metavar="FILE", help="instances file of a data set in COCO format instead"
    )
    group.add_argument("--coco-images", type=Path, metavar="DIR", help="of --coco (its own folder)")
    for field in dataclasses.fields(Tolerances):
        group.add_argument(f"--{field.name.replace('_', '-')}-tolerance", type=float, metavar="MOST")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all figures")


class Evidence(NamedTuple):
    """What backends are compared on: JPEG files, and a data set for AP."""

    images: list[bytes]
    dataset: DetectionDataset | None


def read_evidence(arguments: argparse.Namespace) -> Evidence:
    """What the options of `add_parity_arguments` name.

    Raises:
        ScriptError, OSError: it cannot be read.
    """
    dataset = read_dataset(arguments.voc, arguments.split, arguments.coco, arguments.coco_images)
    return Evidence(read_images(arguments.images), dataset)


def require_enough(evidence: Evidence, precision: str) -> None:
    """Refuse evidence that cannot prove a backend of this precision.

    Raises:
        ScriptError: the precision is int8 and there is no data set.
    """
    if precision == "int8" and evidence.dataset is None:
        raise ScriptError(
            "the raw predictions of an int8 backend differ too much to prove anything; give a data set to "
            "compare AP on: --voc DIR, or --coco FILE --coco-images DIR"
        )


def chosen_tolerances(arguments: argparse.Namespace, precision: str) -> Tolerances:
    """The tolerances of the precision, with the changes that the options make."""
    given = {
        field.name: value
        for field in dataclasses.fields(Tolerances)
        if (value := getattr(arguments, f"{field.name}_tolerance")) is not None
    }
    return dataclasses.replace(TOLERANCES[precision], **given)


def check_parity(
    archive: Path,
    device: torch.device,
    batch_sizes: Sequence[int],
    arguments: argparse.Namespace,
    evidence: Evidence,
) -> None:
    """Compare an archive's backend with PyTorch, print the figures, write the report.

    batch_sizes: as for `compare`. arguments: with the options of `add_parity_arguments`.

    Raises:
        ScriptError, DamoYoloError, OSError: the backend must not be used.
    """
    from lib.accuracy.parity import compare, load_pair

    reference, candidate = load_pair(archive, device)
    try:
        precision = candidate.pipeline.precision
        require_enough(evidence, precision)
        tolerances = chosen_tolerances(arguments, precision)
        report = compare(reference, candidate, evidence.images, batch_sizes, tolerances, evidence.dataset)
    finally:
        reference.close()
        candidate.close()
    print("\n".join(report.lines()))
    if arguments.json is not None:
        write_json(arguments.json, report.to_mapping())
    report.require_passed()
