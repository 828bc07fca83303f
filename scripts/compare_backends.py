"""Whether a backend says what PyTorch in float32 says: raw predictions of images, and AP on a data set.

python scripts/compare_backends.py --archive model_store/damoyolo.mar --voc DIR

A backend can be built without an error and still be wrong, perhaps for one batch size or one class only. So
each batch size is compared by itself, at every anchor point and for every class.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lib.accuracy.datasets import DatasetError
from lib.accuracy.parity import ParityError, add_parity_arguments, check_parity, read_evidence
from lib.cli import positive_int

from damoyolo.errors import DamoYoloError


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the backend of an archive; 0 if it may be used, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, required=True, metavar="MAR", help="file, or unpacked folder")
    parser.add_argument("--device", help="cpu or cuda[:index] (a GPU where there is one)")
    parser.add_argument(
        "--batch-sizes", type=positive_int, nargs="+", default=[1, 2, 8], metavar="N", help="(%(default)s)"
    )
    add_parity_arguments(parser)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        check_parity(arguments.archive, device, arguments.batch_sizes, arguments, read_evidence(arguments))
    except (ParityError, DamoYoloError, DatasetError, OSError) as error:
        print(f"compare_backends: {error}", file=sys.stderr)
        return 1
    print("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
