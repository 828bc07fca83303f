"""What all commands share: parser, argument types, errors and exit codes; those of the client, and more.

Imports neither torch nor anything that imports it, so that `--help` and usage errors are immediate. Commands
import what they work with in the function that does the work.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from damoyolo.errors import DamoYoloError
from damoyolo_client import command_line
from damoyolo_client.command_line import DEFAULT_MODEL as DEFAULT_MODEL
from damoyolo_client.command_line import DEFAULT_RETRY_S as DEFAULT_RETRY_S
from damoyolo_client.command_line import DEFAULT_URL as DEFAULT_URL
from damoyolo_client.command_line import INTERRUPTED as INTERRUPTED
from damoyolo_client.command_line import Options, add_address
from damoyolo_client.command_line import RenamedOption as RenamedOption
from damoyolo_client.command_line import add_client as add_client
from damoyolo_client.command_line import add_model as add_model
from damoyolo_client.command_line import add_url as add_url
from damoyolo_client.command_line import command_parser as command_parser
from damoyolo_client.command_line import ended_like_ctrl_c as ended_like_ctrl_c
from damoyolo_client.command_line import fraction as fraction
from damoyolo_client.command_line import name_list as name_list
from damoyolo_client.command_line import open_client as open_client
from damoyolo_client.command_line import positive_int as positive_int
from damoyolo_client.command_line import positive_number as positive_number
from damoyolo_client.command_line import printable as printable
from damoyolo_client.command_line import seconds as seconds
from damoyolo_client.errors import ClientError

# What requirements.txt leaves out, and how to get it.
EXTRA_PACKAGES = ("matplotlib", "onnx", "onnxruntime", "onnxscript", "pycocotools")
OPTION_NEEDS = {"plot": "matplotlib", "voc": "pycocotools", "coco": "pycocotools"}
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
INSTALL_EXTRAS = "`python -m pip install -r requirements-dev.txt` installs it"
DEFAULT_MANAGEMENT_URL = "http://127.0.0.1:8081"
DEFAULT_METRICS_URL = "http://127.0.0.1:8082"


# A command cannot do what it was asked to; the message says what was found and what is accepted. It is the
# client's class: the commands handle its errors like their own.
ScriptError = ClientError


def run_command(
    command: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    error_code: int = 1,
) -> int:
    """As that of the client, with the errors of this project and for want of a package."""

    def checked(arguments: argparse.Namespace) -> int | None:
        _check_common_options(arguments)
        try:
            return command(arguments)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in EXTRA_PACKAGES:
                raise
            raise ScriptError(f"{error}; {INSTALL_EXTRAS}") from error

    expected = (ScriptError, DamoYoloError, OSError)
    return command_line.run_command(checked, parser, argv, error_code, expected)


def _check_common_options(arguments: argparse.Namespace) -> None:
    """Refuse at once what would fail after the work: an option for want of a package, or a kind of plot."""
    for option, package in OPTION_NEEDS.items():
        if getattr(arguments, option, None) is not None and importlib.util.find_spec(package) is None:
            raise ScriptError(f"--{option} needs the package {package}; {INSTALL_EXTRAS}")
    plot = getattr(arguments, "plot", None)
    if plot is not None and Path(plot).suffix.lower() not in PLOT_SUFFIXES:
        raise ScriptError(
            f"--plot is {str(plot)!r}; accepted are files that end in {', '.join(PLOT_SUFFIXES)}"
        )


def first_port(count: int) -> Callable[[str], int]:
    """The type of an option: the first of `count` ports in a row, none of them reserved for root."""
    last = 65535 - count + 1

    def port(text: str) -> int:
        number = positive_int(text)
        if not 1024 <= number <= last:
            raise argparse.ArgumentTypeError(f"{text!r} given; accepted is a port from 1024 to {last}")
        return number

    return port


def add_local_server(parser: argparse.ArgumentParser) -> None:
    """Options that name a model of a server on this machine, whose processes the command looks at."""
    parser.add_argument("--inference-url", action=RenamedOption, present="--url")
    add_url(parser)
    add_management_url(parser)
    add_model(parser)


def add_management_url(parser: Options, default: str | None = DEFAULT_MANAGEMENT_URL) -> None:
    """Where the server's management API is."""
    add_address(parser, "--management-url", default, "address of its management port")


def add_metrics_url(parser: Options, default: str | None = DEFAULT_METRICS_URL) -> None:
    """Where the server's metrics are."""
    add_address(parser, "--metrics-url", default, "address of its metrics port")
