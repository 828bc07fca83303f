"""Starts TorchServe in the foreground and says when it can be used, or why it cannot.

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

from lib.cli import positive_seconds
from lib.paths import MODEL_STORE, PROJECT_DIR
from lib.server.mps import MpsError, cuda_mps
from lib.server.process import ServerStartError, TorchServeProcess, busy_ports, read_properties

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAMPLE_IMAGE = "tests/data/smears/smear_3.jpg"


class _StopSignal(Exception):  # noqa: N818 (a wish, not an error)
    """A signal asked to end."""


def _stop(number: int, _frame: FrameType | None) -> None:
    raise _StopSignal(signal.Signals(number).name)


def serve(server: TorchServeProcess, timeout_s: float, ready_file: Path | None = None) -> int:
    """Run `server` until it ends or a signal comes; the exit code.

    ready_file: gets the inference address once every worker has loaded its model.
    """
    try:
        server.start()
        server.wait_until_ready(timeout_s)
        names = server.model_names()
        for name in names:
            print(f"ready: {name}, {len(server.describe(name)['workers'])} worker(s). Try:")
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
    except _StopSignal as stopped:
        print(f"serve: {stopped}, ending the server", file=sys.stderr)
        return 0
    except (ServerStartError, FileNotFoundError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    finally:
        # A second signal while ending must not leave processes behind.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        server.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes."""
    root = PROJECT_DIR
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ts-config", type=Path, default=root / "config.properties")
    parser.add_argument("--model-store", type=Path, default=MODEL_STORE)
    parser.add_argument(
        "--models", help="archives to load, separated by commas (default: load_models of the config)"
    )
    parser.add_argument(
        "--any-port", action="store_true", help="take free ports where those of the config are taken"
    )
    parser.add_argument(
        "--enable-model-api", action="store_true", help="let the management API register archives"
    )
    parser.add_argument(
        "--mps", action="store_true", help="let several workers compute on a GPU at once (NVIDIA MPS)"
    )
    parser.add_argument("--ready-file", type=Path, help="gets the inference address once the server is ready")
    parser.add_argument(
        "--timeout", type=positive_seconds, default=300.0, metavar="S", help="longest wait for the workers"
    )
    arguments = parser.parse_args(argv)

    busy = busy_ports(read_properties(arguments.ts_config)) if arguments.any_port else []
    if busy:
        print(f"port {', '.join(map(str, busy))} is taken; using free ports instead", flush=True)
    overrides: dict[str, str | None] = {"load_models": arguments.models} if arguments.models else {}
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    try:
        with cuda_mps(arguments.mps) as environment:
            server = TorchServeProcess(
                arguments.ts_config.resolve(),
                arguments.model_store.resolve(),
                working_dir=root,
                overrides=overrides,
                use_free_ports=bool(busy),
                log_dir=root / "logs",
                echo=sys.stdout,
                arguments=["--enable-model-api"] if arguments.enable_model_api else [],
                environment=environment,
            )
            return serve(server, arguments.timeout, arguments.ready_file)
    except MpsError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    except _StopSignal as stopped:  # while the service started
        print(f"serve: {stopped}", file=sys.stderr)
        return 0


if __name__ == "__main__":
    sys.exit(main())
