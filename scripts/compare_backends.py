"""Check that a backend agrees with PyTorch in float32: raw predictions of images, and AP on a data set.

python scripts/compare_backends.py --archive model_store/damoyolo.mar --voc DIR

A backend can be built without an error and still be wrong, perhaps only for one batch size or one class. So
each batch size is compared separately, at every anchor point and for every class.

Prints the largest differences, and `passed`; exit code 1 if they are above the tolerances.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.accuracy.parity_options import add_parity_arguments, check_parity, read_evidence
from lib.cli import command_parser, positive_int, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the backend of an archive; 0 if it may be used, else 1."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    from lib.devices import open_device

    device = open_device(arguments.device)
    check_parity(arguments.archive, device, arguments.batch_sizes, arguments, read_evidence(arguments))
    print("passed")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__, {"--pictures": "--images", "--coco-pictures": "--coco-images", "--report": "--json"}
    )
    parser.add_argument("--archive", type=Path, required=True, metavar="MAR", help="file, or unpacked folder")
    parser.add_argument("--device", help="cpu or cuda[:index] (a GPU if there is one)")
    parser.add_argument(
        "--batch-sizes", type=positive_int, nargs="+", default=[1, 2, 8], metavar="N", help="(%(default)s)"
    )
    add_parity_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
