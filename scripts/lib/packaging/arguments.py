"""Options shared by the commands that load a network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lib.packaging.class_names import default_class_names, read_class_names
from lib.paths import DEMO_WEIGHTS

if TYPE_CHECKING:
    from damoyolo.model.damoyolo import DamoYolo


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that name weights."""
    parser.add_argument(
        "--weights",
        default=str(DEMO_WEIGHTS),
        help="file, https address or official name (default: the demo weights)",
    )
    parser.add_argument("--sha256", help="expected digest of the weights, in hexadecimal")


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that name weights, and the network that they belong to."""
    add_weights_arguments(parser)
    parser.add_argument("--variant", help="default: the one that the weights fit")
    parser.add_argument(
        "--class-names",
        type=Path,
        help="text (one name per line) or JSON file (default: the demo's for its weights, else COCO's 80)",
    )
    parser.add_argument(
        "--unused-class",
        action="store_true",
        help="the last class channel of the weights is the unused one of older DAMO-YOLO heads",
    )


def load_network(arguments: argparse.Namespace) -> tuple[DamoYolo, tuple[str, ...]]:
    """The folded network that the options of `add_network_arguments` name, and its class names.

    Raises:
        ScriptError, CheckpointError, ConfigError: something cannot be read, or does not fit.
    """
    from lib.packaging.weights import fetch_weights, folded_network

    weights = fetch_weights(arguments.weights, arguments.sha256)
    given = arguments.class_names
    class_names = read_class_names(given) if given else default_class_names(weights)
    network = folded_network(weights, arguments.variant, len(class_names), arguments.unused_class)
    return network, class_names
