"""Scale or update the model of a running server without a failed request.

python scripts/deploy.py update new.mar    serve another archive, once it has answered golden images correctly
python scripts/deploy.py rollback          serve the archive from before the last update again
python scripts/deploy.py scale 4           serve the same archive with 4 workers
python scripts/deploy.py status            show what is registered and kept

A version is registered beside the served one, so both need memory for a while. The server has to allow it:
`python scripts/serve.py --enable-model-api`. After an interruption the next command finishes or undoes what
was begun. docs/reliability.md describes each step.

Prints each step.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib.cli import (
    RenamedOption,
    add_management_url,
    add_metrics_url,
    add_model,
    add_url,
    command_parser,
    ended_like_ctrl_c,
    positive_int,
    positive_number,
    run_command,
)
from lib.paths import MODEL_STORE, PROJECT_DIR, SAMPLE_IMAGES

if TYPE_CHECKING:
    from lib.deploy.rollout import Rollout
    from lib.deploy.store import ArchiveStore
    from lib.server.management import Management


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    from lib.deploy.store import ArchiveStore
    from lib.server.management import Management, read_key_file
    from lib.server.process import local_url, read_properties

    properties = read_properties(arguments.ts_config)
    keys = read_key_file(arguments.key_file) if arguments.key_file else (None, None)
    management_url = arguments.management_url or local_url(properties["management_address"])
    metrics_url = arguments.metrics_url or local_url(properties["metrics_address"])
    store = ArchiveStore(arguments.model_store.resolve(), arguments.model)
    with contextlib.closing(Management(management_url, metrics_url, arguments.model, keys[0])) as management:
        if arguments.command == "status":
            _show(management, store)
            return
        inference_url = arguments.url or local_url(properties["inference_address"])
        with store.locked(), ended_like_ctrl_c():
            _change(_rollout(arguments, management, store, inference_url, keys[1]), arguments)


def _rollout(
    arguments: argparse.Namespace,
    management: Management,
    store: ArchiveStore,
    inference_url: str,
    inference_token: str | None,
) -> Rollout:
    from lib.deploy.golden import read_golden_images
    from lib.deploy.rollout import Rollout
    from lib.deploy.waiting import Limits

    return Rollout(
        management,
        store,
        f"{inference_url.rstrip('/')}/predictions/{arguments.model}",
        read_golden_images(arguments.golden),
        arguments.server_log,
        Limits(arguments.ready_timeout, arguments.idle_timeout),
        inference_token=inference_token,
        new_classes=getattr(arguments, "new_classes", False),
        discard=arguments.discard,
        say=_say,
    )


def _change(rollout: Rollout, arguments: argparse.Namespace) -> None:
    if arguments.command == "update":
        rollout.update(arguments.archive, arguments.workers)
    elif arguments.command == "rollback":
        rollout.rollback()
    else:
        rollout.scale(arguments.workers)


def _show(management: Management, store: ArchiveStore) -> None:
    default, record = management.default_version(), store.read_record()
    for version, found in sorted(management.versions().items()):
        print(
            f"{store.model_name} {version}{' (default)' if version == default else ''}: "
            f"{len(found.ready_pids)} of {found.wanted_workers} workers ready, "
            f"{found.pending} requests waiting, from {found.archive}"
        )
    print(f"rollback serves version {record.previous or '(none)'}")
    if record.adding is not None:
        print(
            f"unfinished: version {record.adding} in place of {record.replacing}; the next command finishes "
            "it if it is the default, and else undoes it"
        )


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    server = argparse.ArgumentParser(add_help=False)
    _add_server_options(server)
    change = argparse.ArgumentParser(add_help=False)
    _add_change_options(change)

    update = commands.add_parser("update", parents=[server, change], help="serve another archive")
    update.add_argument("archive", type=Path, metavar="ARCHIVE", help="as build_archive.py makes it")
    update.add_argument("--workers", type=positive_int, metavar="N", help="(default: as many as now)")
    update.add_argument("--new-classes", action="store_true", help="accept other classes than those served")
    commands.add_parser("rollback", parents=[server, change], help="serve the archive from before the update")
    scale = commands.add_parser("scale", parents=[server, change], help="change the number of workers")
    scale.add_argument("workers", type=positive_int, metavar="N")
    commands.add_parser("status", parents=[server], help="show versions, workers, and what a rollback serves")
    return parser


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser)
    add("--model-store", type=Path, default=MODEL_STORE, metavar="DIR", help="that of the server")
    add("--ts-config", type=Path, default=PROJECT_DIR / "config.properties", help="settings of the server")
    add_management_url(parser, None)
    add_metrics_url(parser, None)
    add("--key-file", type=Path, help="key_file.json of a server with token authorization")


def _add_change_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--inference-url", action=RenamedOption, present="--url")
    add_url(parser, None)
    add(
        "--golden",
        type=Path,
        default=SAMPLE_IMAGES,
        metavar="DIR",
        help="images that a version has to answer correctly; NAME.json beside one lists "
        "[label, x1, y1, x2, y2] of its objects (default: the sample images)",
    )
    add("--ready-timeout", type=positive_number, default=300.0, metavar="S", help="for workers to start")
    add("--idle-timeout", type=positive_number, default=300.0, metavar="S", help="for a version to get idle")
    add("--discard", action="store_true", help="remove a version that does not get idle; loses its requests")
    add(
        "--server-log",
        type=Path,
        default=PROJECT_DIR / "logs" / "torchserve.log",
        metavar="FILE",
        help="says why a worker does not start (default: that of serve.py)",
    )


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        os.nice(10)  # the served model comes first
    sys.exit(main())
