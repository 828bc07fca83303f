"""The parser, argument types, errors and exit codes of all commands.

Imports little, so that `--help` and usage errors are immediate. Commands import what they work with in the
function that does the work.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from damoyolo_client.errors import ClientError

if TYPE_CHECKING:
    from damoyolo_client.client import Client

MAX_SHOWN = 2000
FILE_OPTIONS = ("output", "json", "jsonl", "plot", "results")
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it

# Of a server with the ports of config.properties. `--url` means the same in every command.
DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_MODEL = "damoyolo"
DEFAULT_RETRY_S = 120.0  # a server needs less to start again
TOKEN_VARIABLE = "DAMOYOLO_TOKEN"

Options = argparse.ArgumentParser | argparse._ArgumentGroup


def run_command(
    command: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    error_code: int = 1,
    expected: tuple[type[Exception], ...] = (ClientError, OSError),
) -> int:
    """Parse the arguments and run the command; the exit code.

    The one place where an expected error becomes a line on stderr and `error_code`. Ctrl-C gives INTERRUPTED.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of file names that are no text, say
    arguments = parser.parse_args(argv)
    try:
        _prepare_files(arguments)
        return command(arguments) or 0
    except BrokenPipeError:  # of `| head`: nobody reads on
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return error_code
    except expected as error:
        lines = str(error).split("\n")  # the traceback of a worker has several
        print(f"{Path(parser.prog).stem}: " + "\n".join(map(printable, lines)), file=sys.stderr)
        return error_code
    except KeyboardInterrupt:
        print(f"{Path(parser.prog).stem}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _prepare_files(arguments: argparse.Namespace) -> None:
    """Make the folders of the files to be written, and refuse at once what would fail after the work."""
    for option in FILE_OPTIONS:
        path = getattr(arguments, option, None)
        if path is None:
            continue
        if Path(path).is_dir():
            raise ClientError(f"--{option} is {str(path)!r}, which is a folder; accepted is a file")
        Path(path).parent.mkdir(parents=True, exist_ok=True)


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
        parser.add_argument(former, action=RenamedOption, present=present)
    return parser


class RenamedOption(argparse.Action):
    """Refuses the former name of an option with its present one."""

    def __init__(self, option_strings: Sequence[str], dest: str, present: str) -> None:
        super().__init__(option_strings, dest, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.present = present

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]} is now called {self.present}")


def add_url(parser: Options, default: str | None = DEFAULT_URL) -> None:
    """The server to use. None: the command reads it from --ts-config."""
    add_address(parser, "--url", default, "address of the server's inference port")


def add_address(parser: Options, option: str, default: str | None, meaning: str) -> None:
    """An address of the server."""
    given = "from --ts-config" if default is None else "%(default)s"
    parser.add_argument(option, default=default, metavar="URL", help=f"{meaning} ({given})")


def add_model(parser: Options) -> None:
    """The model of the server."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME", help="name of the served model (%(default)s)"
    )


def add_client(parser: Options) -> None:
    """The server and how to ask it: what `open_client` reads."""
    add_url(parser)
    add_model(parser)
    parser.add_argument(
        "--timeout",
        type=positive_number,
        default=60.0,
        metavar="S",
        help="longest wait for an answer in each attempt (%(default)s)",
    )
    parser.add_argument(
        "--retry-seconds",
        type=seconds,
        default=DEFAULT_RETRY_S,
        metavar="S",
        help="how long an image is sent again while the server is full or starts again (%(default)s)",
    )
    parser.add_argument(
        "--ca-file",
        type=Path,
        metavar="PEM",
        help=f"authority of the server's certificate; its token is read from {TOKEN_VARIABLE}",
    )


def open_client(arguments: argparse.Namespace) -> Client:
    """A client of the server that the options of `add_client` name. The token is in the environment, because
    every user of the machine can read command lines.
    """
    from damoyolo_client.client import Client

    return Client(
        arguments.url,
        arguments.model,
        arguments.timeout,
        arguments.retry_seconds,
        token=os.environ.get(TOKEN_VARIABLE) or None,
        ca_file=arguments.ca_file,
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
