"""Run TorchServe in the foreground and say when it is ready, or why it is not.

python scripts/serve.py                 ports of config.properties
python scripts/serve.py --port 9000     management at 9001, metrics at 9002, gRPC at 9003 and 9004
python scripts/serve.py --any-port      free ports where those are taken

Prints the log of the server, and the addresses once it is ready. Ctrl-C
answers what was accepted and ends the server; a second one ends it at once. Exit code: 0 after a signal, 1 if
the server does not start, has lost a model for good or was killed.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib.cli import command_parser, first_port, positive_number, run_command
from lib.paths import MODEL_STORE, PROJECT_DIR
from lib.server.stop_signals import StopSignal, on_stop_signals, raise_stop

if TYPE_CHECKING:
    from lib.server.dropping_output import DroppingOutput
    from lib.server.process import TorchServeProcess

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAMPLE_IMAGE = "tests/data/smears/smear_3.jpg"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> int:
    from lib.server.dropping_output import DroppingOutput

    # Neither a closed nor a blocked output may hold the server.
    out, err = DroppingOutput(sys.stdout), DroppingOutput(sys.stderr)
    on_stop_signals(raise_stop, STOP_SIGNALS)
    try:
        return _run_server(arguments, out, err)
    except StopSignal as stopped:  # before the server started
        err.print(f"serve: {stopped}")
        return 0
    finally:
        for each in (out, err):
            each.flush()


def _run_server(arguments: argparse.Namespace, out: DroppingOutput, err: DroppingOutput) -> int:
    from lib.server.mps import cuda_mps
    from lib.server.process import TorchServeProcess, busy_ports, ports_from, read_properties

    properties = read_properties(arguments.ts_config)
    overrides = {} if arguments.port is None else ports_from(arguments.port, properties)
    busy = busy_ports({**properties, **overrides}) if arguments.any_port else []
    if arguments.models:
        overrides["load_models"] = arguments.models
    if busy:
        out.print(f"port {', '.join(map(str, busy))} is taken; using free ports instead")
    with cuda_mps(arguments.mps) as environment:
        server = TorchServeProcess(
            arguments.ts_config.resolve(),
            arguments.model_store.resolve(),
            overrides=overrides,
            use_free_ports=bool(busy),
            log_dir=arguments.log_dir.resolve(),
            echo=out,
            arguments=["--enable-model-api"] if arguments.enable_model_api else [],
            environment=environment,
        )
        try:
            return _serve(server, arguments, out, err)
        except StopSignal as stopped:
            on_stop_signals(lambda *_: server.kill(), STOP_SIGNALS)
            err.print(f"serve: {stopped}, answering what was accepted; a second signal ends all at once")
            if server.stop():
                return 0
            err.print("serve: the server was killed; requests under way are lost")
            return 1
        finally:
            # A further signal must not leave processes behind.
            on_stop_signals(lambda *_: server.kill(), STOP_SIGNALS)
            server.stop()


def _serve(
    server: TorchServeProcess, arguments: argparse.Namespace, out: DroppingOutput, err: DroppingOutput
) -> int:
    """Run `server` until it ends or has lost a model for good; both are errors."""
    from lib.server.process import describe_model

    server.start()
    server.wait_until_ready(arguments.timeout)
    for name in server.model_names():
        workers = describe_model(server.management_url, name)["workers"]
        out.print(f"ready: {name}, {len(workers)} worker(s). Try:")
        out.print(f"  curl --max-time 60 -X POST {server.inference_url}/predictions/{name} -T {SAMPLE_IMAGE}")
        out.print(f"  or open {server.inference_url}/predictions/{name} in a browser")
    out.print(
        f"management {server.management_url}   metrics {server.metrics_url}/metrics   Ctrl-C ends the server"
    )
    if arguments.ready_file is not None:
        out.flush()
        arguments.ready_file.write_text(f"{server.inference_url}\n")
    err.print(f"serve: {server.wait()}")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add(
        "--ts-config",
        type=Path,
        metavar="FILE",
        default=PROJECT_DIR / "config.properties",
        help="settings of the server",
    )
    add("--model-store", type=Path, metavar="DIR", default=MODEL_STORE, help="folder of the archives")
    add("--log-dir", type=Path, metavar="DIR", default=PROJECT_DIR / "logs", help="folder of the logs")
    add(
        "--models",
        metavar="A,B",
        help="archives to load, separated by commas (default: load_models of the config)",
    )
    ports = "of inference; management N+1, metrics N+2, gRPC N+3 and N+4"
    add("--port", type=first_port(5), metavar="N", help=ports)
    add("--any-port", action="store_true", help="take free ports where those, or the config's, are taken")
    add("--enable-model-api", action="store_true", help="let the management API register archives")
    add("--mps", action="store_true", help="let several workers use a GPU at the same time (NVIDIA MPS)")
    add("--ready-file", type=Path, metavar="FILE", help="gets the inference address once the server is ready")
    add("--timeout", type=positive_number, default=300.0, metavar="S", help="longest wait for the workers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
