"""Run TorchServe in the foreground and say when it is ready, or why it is not.

python scripts/serve.py                 ports of config.properties
python scripts/serve.py --any-port      other ports where those are taken
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lib.cli import command_parser, positive_seconds, run_command
from lib.paths import MODEL_STORE, PROJECT_DIR

if TYPE_CHECKING:
    from lib.server.process import TorchServeProcess

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAMPLE_IMAGE = "tests/data/smears/smear_3.jpg"


class _StopSignal(Exception):  # noqa: N818 (a request, not an error)
    """The command has to end."""


def _stop(number: int, _frame: FrameType | None) -> None:
    raise _StopSignal(signal.Signals(number).name)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> int:
    from lib.server.mps import cuda_mps
    from lib.server.process import TorchServeProcess, busy_ports, read_properties

    busy = busy_ports(read_properties(arguments.ts_config)) if arguments.any_port else []
    if busy:
        print(f"port {', '.join(map(str, busy))} is taken; using free ports instead", flush=True)
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    try:
        with cuda_mps(arguments.mps) as environment:
            server = TorchServeProcess(
                arguments.ts_config.resolve(),
                arguments.model_store.resolve(),
                overrides={"load_models": arguments.models} if arguments.models else {},
                use_free_ports=bool(busy),
                log_dir=PROJECT_DIR / "logs",
                echo=sys.stdout,
                arguments=["--enable-model-api"] if arguments.enable_model_api else [],
                environment=environment,
            )
            try:
                return _serve(server, arguments.timeout, arguments.ready_file)
            except _StopSignal as stopped:
                print(f"serve: {stopped}, ending the server", file=sys.stderr)
                return 0
            finally:
                # A second signal while ending must not leave processes behind.
                for number in STOP_SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                server.stop()
    except _StopSignal as stopped:  # while MPS started
        print(f"serve: {stopped}", file=sys.stderr)
        return 0


def _serve(server: TorchServeProcess, timeout_s: float, ready_file: Path | None) -> int:
    """Run `server` until it ends.

    ready_file: gets the inference address once every worker has loaded its model.
    """
    from lib.server.process import describe_model

    server.start()
    server.wait_until_ready(timeout_s)
    for name in server.model_names():
        workers = describe_model(server.management_url, name)["workers"]
        print(f"ready: {name}, {len(workers)} worker(s). Try:")
        print(f"  curl --max-time 60 -X POST {server.inference_url}/predictions/{name} -T {SAMPLE_IMAGE}")
    print(
        f"management {server.management_url}   metrics {server.metrics_url}/metrics   Ctrl-C ends it",
        flush=True,
    )
    if ready_file is not None:
        ready_file.write_text(f"{server.inference_url}\n")
    server.wait()
    print("serve: the server ended by itself; its last lines are above", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--ts-config", type=Path, default=PROJECT_DIR / "config.properties", help="settings of the server")
    add("--model-store", type=Path, default=MODEL_STORE, help="folder of the archives")
    add("--models", help="archives to load, separated by commas (default: load_models of the config)")
    add("--any-port", action="store_true", help="take free ports where those of the config are taken")
    add("--enable-model-api", action="store_true", help="let the management API register archives")
    add("--mps", action="store_true", help="let several workers use a GPU at the same time (NVIDIA MPS)")
    add("--ready-file", type=Path, help="gets the inference address once the server is ready")
    add("--timeout", type=positive_seconds, default=300.0, metavar="S", help="longest wait for the workers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
