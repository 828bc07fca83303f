"""The parser, argument types, errors and exit codes of all commands.

Imports neither torch nor anything that imports it, so that `--help` and usage errors are immediate. Commands
import what they work with in the function that does the work.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from damoyolo.errors import DamoYoloError

MAX_SHOWN = 2000
# What requirements.txt leaves out, and how to get it.
EXTRA_PACKAGES = ("matplotlib", "onnx", "onnxruntime", "onnxscript", "pycocotools")
OPTION_NEEDS = {"plot": "matplotlib", "voc": "pycocotools", "coco": "pycocotools"}
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
INSTALL_EXTRAS = "`python -m pip install -r requirements-dev.txt` installs it"
INTERRUPTED = 130  # exit code after Ctrl-C, as a shell has it


# Of a server with the ports of config.properties. `--url` has the same meaning in every command.
DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_MANAGEMENT_URL = "http://127.0.0.1:8081"
DEFAULT_METRICS_URL = "http://127.0.0.1:8082"
DEFAULT_MODEL = "damoyolo"

_Options = argparse.ArgumentParser | argparse._ArgumentGroup


class ScriptError(Exception):
    """A command cannot do what it was asked to; the message says what was found and what is accepted."""


def run_command(
    command: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    error_code: int = 1,
) -> int:
    """Parse the arguments and run the command; the exit code.

    The one place where an expected error becomes a line on stderr and `error_code`. Ctrl-C gives 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of file names that are no text, say
    arguments = parser.parse_args(argv)
    try:
        _check_common_options(arguments)
        return command(arguments) or 0
    except BrokenPipeError:  # of `| head`: nobody reads on
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return error_code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA_PACKAGES:
            raise
        print(f"{Path(parser.prog).stem}: {error}; {INSTALL_EXTRAS}", file=sys.stderr)
        return error_code
    except (ScriptError, DamoYoloError, OSError) as error:
        lines = str(error).split("\n")  # the traceback of a worker has several
        print(f"{Path(parser.prog).stem}: " + "\n".join(map(printable, lines)), file=sys.stderr)
        return error_code
    except KeyboardInterrupt:
        print(f"{Path(parser.prog).stem}: interrupted", file=sys.stderr)
        return INTERRUPTED


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


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does, where a command has something to finish."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def printable(text: str) -> str:
    """Text from elsewhere as one line that a terminal shows and cannot obey; cut at MAX_SHOWN characters.

    Control characters, line ends, marks that turn the direction of writing, and bytes of file names that are
    no text become escape sequences of Python.
    """
    shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in shown
    )


def command_parser(
    description: str | None, renamed_options: Mapping[str, str] | None = None
) -> argparse.ArgumentParser:
    """A parser that shows the description as it is written.

    renamed_options: former names of options; each is refused with its present name.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for former, present in (renamed_options or {}).items():
        parser.add_argument(former, action=_RenamedOption, present=present)
    return parser


class _RenamedOption(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, present: str) -> None:
        super().__init__(option_strings, dest, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.present = present

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]} is now called {self.present}")


def add_local_server(parser: argparse.ArgumentParser) -> None:
    """Options that name a model of a server on this machine, whose processes the command looks at."""
    parser.add_argument("--inference-url", action=_RenamedOption, present="--url")
    add_url(parser)
    add_management_url(parser)
    add_model(parser)


def add_url(parser: _Options, default: str | None = DEFAULT_URL) -> None:
    """The server to use; the same option in all commands. None: the command reads it from --ts-config."""
    _add_address(parser, "--url", default, "address of the server's inference port")


def add_management_url(parser: _Options, default: str | None = DEFAULT_MANAGEMENT_URL) -> None:
    """Where the server's management API is."""
    _add_address(parser, "--management-url", default, "address of its management port")


def add_metrics_url(parser: _Options, default: str | None = DEFAULT_METRICS_URL) -> None:
    """Where the server's metrics are."""
    _add_address(parser, "--metrics-url", default, "address of its metrics port")


def _add_address(parser: _Options, option: str, default: str | None, meaning: str) -> None:
    given = "from --ts-config" if default is None else "%(default)s"
    parser.add_argument(option, default=default, metavar="URL", help=f"{meaning} ({given})")


def add_model(parser: _Options) -> None:
    """The model of the server."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME", help="name of the served model (%(default)s)"
    )


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted is a whole number from 1 up")
    return int(text)


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted is a number above 0")
    return value


def positive_seconds(text: str) -> float:
    """A finite duration above 0, in seconds."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted is a number of seconds above 0")
    return value


def seconds(text: str) -> float:
    """A finite duration, in seconds; 0 is accepted."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted is a number of seconds from 0 up")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1, both included."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted is a number from 0 to 1")
    return value


def name_list(text: str) -> tuple[str, ...]:
    """Names separated by commas, without the blanks around them."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted are names separated by single commas")
    return names


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # outside every range
