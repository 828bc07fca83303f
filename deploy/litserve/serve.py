"""Serve a detector's archive by LitServe: POST an image to /predict; GET /health answers 200 when ready.

python deploy/litserve/serve.py                                      the demo archive on port 8000
python deploy/litserve/serve.py --archive mine.mar --workers 2 --batch-size 16 --max-batch-delay 2

Needs the package litserve (deploy/litserve/requirements.txt). Answers as TorchServe does with the same
archive (docs/litserve.md). Prints LitServe's log. Ctrl-C or SIGTERM ends the server. Exit code: 0 after a
signal, 1 if it does not start.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = Path(__file__).resolve().parent
PROJECT_DIR = FOLDER.parents[1]
sys.path.append(str(PROJECT_DIR / "scripts"))

from lib.cli import (  # noqa: E402
    ScriptError,
    command_parser,
    first_port,
    positive_int,
    positive_number,
    run_command,
)
from lib.paths import DEMO_ARCHIVE  # noqa: E402

REQUIREMENTS = "deploy/litserve/requirements.txt"
DEFAULT_PORT = 8000  # LitServe's


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> int:
    from lib.archive.members import opened_archive
    from lib.server.mps import cuda_mps

    signal.signal(signal.SIGTERM, _interrupt_in(os.getpid()))
    with tempfile.TemporaryDirectory(prefix="litserve-") as folder, cuda_mps(arguments.mps) as variables:
        os.environ.update(variables)
        with opened_archive(arguments.archive) as opened:
            opened.extractall(folder)
        # The workers, which inherit the path, run the archive's own modules.
        sys.path.insert(0, folder)
        try:
            _serve(arguments, Path(folder))
        except KeyboardInterrupt:
            pass  # before LitServe was ready for it
        except (RuntimeError, SystemExit) as error:
            raise ScriptError(f"LitServe does not start ({error}); the cause is above") from None
        finally:
            # LitServe leaves them running if it does not start, and waits for them.
            for child in multiprocessing.active_children():
                child.kill()
    return 0


def _interrupt_in(process_id: int) -> Callable[[int, FrameType | None], None]:
    """For SIGTERM: what LitServe ends at. Processes that it forks inherit this, and end in their own way."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if os.getpid() == process_id:
            raise KeyboardInterrupt

    return interrupt


def _serve(arguments: argparse.Namespace, model_dir: Path) -> None:
    from lib.archive.members import batching_of
    from lib.server.process import read_properties

    try:
        from detection_api import DetectionAPI, make_server
    except ModuleNotFoundError as error:
        raise ScriptError(
            f"{error}; `pip install -r deploy/litserve/requirements.txt` installs it"
        ) from error

    gpus = _gpus(arguments)
    settings = _settings(arguments, max(1, gpus))
    setting = batching_of(settings)
    api_servers = arguments.api_servers or setting.workers
    server = make_server(
        DetectionAPI(model_dir, settings, api_servers),
        int(read_properties(PROJECT_DIR / "config.properties")["max_request_size"]),
        arguments.timeout or float(settings["responseTimeout"]),
        accelerator="cuda" if gpus else "cpu",
        devices=max(1, gpus),
        workers_per_device=setting.workers // max(1, gpus),
    )
    server.run(
        host=arguments.host,
        port=arguments.port,
        num_api_servers=api_servers,
        log_level="warning",
        generate_client_file=False,
    )


def _gpus(arguments: argparse.Namespace) -> int:
    """How many to use; 0 for the CPU."""
    from lib.server.gpus import count_gpus

    found = 0 if arguments.device == "cpu" else count_gpus()
    if arguments.device == "cuda" and not found:
        raise ScriptError("--device is cuda, but CUDA finds no GPU")
    if arguments.devices and arguments.devices > found:
        because = "--device is cpu" if arguments.device == "cpu" else f"CUDA finds {found} GPU(s)"
        raise ScriptError(f"--devices is {arguments.devices}, but {because}")
    return arguments.devices or found


def _settings(arguments: argparse.Namespace, devices: int) -> dict[str, Any]:
    """Those of the archive with what the options replace; workers and queue are for all devices."""
    from lib.archive.members import batching_of, setting_with, settings_to_open, settings_with

    settings = settings_to_open(arguments.archive)
    own = batching_of(settings)
    setting = setting_with(own, arguments.batch_size, arguments.max_batch_delay, arguments.workers)
    if setting != own:  # the graphs of the network are for certain batch sizes
        settings = settings_with(settings, setting)
    total = replace(setting, workers=devices * setting.workers)
    return settings if total == own else {**settings, **total.model_settings()}


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--archive", type=Path, default=DEMO_ARCHIVE, metavar="MAR", help="what to serve (%(default)s)")
    add("--host", choices=["127.0.0.1", "0.0.0.0", "::"], default="127.0.0.1", help="(%(default)s)")
    add("--port", type=first_port(1), default=DEFAULT_PORT, metavar="N", help="(%(default)s)")
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto takes the GPUs if there are any",
    )
    add("--devices", type=positive_int, metavar="N", help="the first N GPUs (default: all)")
    add("--mps", action="store_true", help="let several workers use a GPU at the same time (NVIDIA MPS)")
    add("--workers", type=positive_int, metavar="N", help="on each device (default: the archive's)")
    add("--batch-size", type=positive_int, metavar="N", help="(default: the archive's)")
    add("--max-batch-delay", type=positive_int, metavar="MS", help="(default: the archive's)")
    servers = "processes that read requests (default: as many as workers)"
    add("--api-servers", type=positive_int, metavar="N", help=servers)
    waiting = "longest wait of a request in the queue (default: the archive's responseTimeout)"
    add("--timeout", type=positive_number, metavar="S", help=waiting)
    return parser


if __name__ == "__main__":
    sys.exit(main())
