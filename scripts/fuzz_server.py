"""Post a folder of arbitrary files to a running server beside good images, and check what they cost whom.

No file may cause a status of 500 or above, change or fail the answer to a good image of the same batch, end a
worker, or exceed the limits of time and memory. The server must run on this machine, on Linux.

python scripts/fuzz_server.py corpus
python scripts/fuzz_server.py corpus --forms raw json drawn --json output/fuzz.json

Prints each problem, a table of statuses, and how many problems there were.
Exit code: 0 if nothing was wrong, 1 if something was, 2 if nothing could be sent, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.cli import ScriptError, add_local_server, command_parser, positive_int, positive_number, run_command
from lib.json_file import write_json
from lib.paths import PROJECT_DIR

GOOD_IMAGES = ("smear_3.jpg", "smear_4.jpg")
FORM_NAMES = ("raw", "form", "multipart", "json", "body-as-json", "drawn")


def main(argv: Sequence[str] | None = None) -> int:
    """Send the files; 0 if nothing was wrong, 1 if something was, 2 if nothing could be sent."""
    return run_command(_run, _parser(), argv, error_code=2)


def _run(arguments: argparse.Namespace) -> int:
    from lib.load.hostile import HostileClient, Limits, summarize
    from lib.server.served_archive import ServedModel

    files = sorted(path for path in arguments.folder.rglob("*") if path.is_file())[: arguments.limit]
    if not files:
        raise ScriptError(f"{arguments.folder} holds no file")
    served = ServedModel(arguments.url.rstrip("/"), arguments.management_url, "", arguments.model)
    folder = PROJECT_DIR / "tests" / "data" / "smears"
    good = [path.read_bytes() for path in arguments.good or [folder / name for name in GOOD_IMAGES]]
    client = HostileClient(served, good, Limits(arguments.max_seconds, arguments.max_memory_mb))
    attempts = []
    try:
        for attempt in client.try_files(files, arguments.forms):
            attempts.append(attempt)
            for problem in () if arguments.quiet else attempt.problems:
                print(f"{ascii(attempt.file)[1:-1]} as {attempt.form}: {problem}", flush=True)
    finally:
        client.close()
        print(summarize(attempts))
        if arguments.json is not None:
            write_json(arguments.json, [attempt.to_json() for attempt in attempts])
    failed = sum(len(attempt.problems) for attempt in attempts)
    print(f"{len(attempts)} requests of {len(files)} files: {failed or 'no'} problems")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, help="files of any kind; sub-folders are kinds in the table")
    add_local_server(parser)
    parser.add_argument(
        "--forms", nargs="+", choices=FORM_NAMES, default=["raw"], help="how each is sent; default: raw"
    )
    parser.add_argument("--good", nargs="+", type=Path, help="neighbours; default: two sample images")
    parser.add_argument("--limit", type=positive_int, help="send the first so many files only")
    parser.add_argument("--max-seconds", type=positive_number, default=10.0, help="default: %(default)s")
    parser.add_argument("--max-memory-mb", type=positive_int, default=1500, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every attempt")
    parser.add_argument("--quiet", action="store_true", help="print the table and the summary alone")
    return parser


if __name__ == "__main__":
    sys.exit(main())
