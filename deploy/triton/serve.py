"""Serve an archive of this project with Triton, in the foreground.

python deploy/triton/serve.py --archive model_store/damoyolo.mar
python deploy/triton/serve.py --port 9000 -- --log-verbose=1        what follows -- goes to tritonserver

HTTP at --port of 127.0.0.1, gRPC at the next port, metrics at the one after it. SIGTERM or Ctrl-C answers
what was accepted and ends the server. Exit code: 0 after a signal, 1 if the server does not start, ends by
itself or has lost a process of its backend, which Triton does not start again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from build_repository import add_model_options, build_from
from program import STUB, find_program

from lib.cli import ScriptError, command_parser, first_port, run_command
from lib.server.stop_signals import StopSignal, on_stop_signals, raise_stop

if TYPE_CHECKING:
    from lib.server.watcher import Watcher

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_S = 0.5
EXIT_TIMEOUT_S = 30
END_S = 5.0  # for the rest, and for a server that has lost a process
READY_TIMEOUT_S = 2.0
# What a client of the inference port may not do: read the host's shared memory, load models, write logs.
CLOSED = ("model-repository", "shared-memory", "trace", "logging")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> int:
    on_stop_signals(raise_stop, STOP_SIGNALS)
    try:
        return _serve(arguments)
    except StopSignal as stopped:  # before the server started
        print(f"serve: {stopped}", file=sys.stderr)
        return 0


def _serve(arguments: argparse.Namespace) -> int:
    from lib.server.mps import cuda_mps
    from lib.server.process import free_ports
    from lib.server.watcher import Watcher

    ports = free_ports(3) if arguments.any_port else [arguments.port + offset for offset in range(3)]
    _require_free(ports)
    with tempfile.TemporaryDirectory(prefix="triton-") as folder, cuda_mps(arguments.mps) as variables:
        # A process that is killed leaves its shared memory, which has a name of our own.
        prefix = f"{Path(folder).name}-"
        clean_up = ["find", "/dev/shm", "-maxdepth", "1", "-name", f"{prefix}*", "-delete"]
        watcher = Watcher(Path(folder), clean_up)
        program = find_program(Path(folder))
        repository = Path(folder) / "repository"
        name = build_from(arguments, repository)
        command = [str(program.path), f"--model-repository={repository}", *_server_options(ports)]
        command += [f"--backend-config=python,shm-region-prefix-name={prefix}", *program.arguments]
        # A signal that comes before the server is known would lose it, so it has to wait.
        waiting: list[int] = []
        on_stop_signals(lambda number, _: waiting.append(number), STOP_SIGNALS)
        server = _start([*command, *arguments.tritonserver], {**variables, **program.environment}, watcher)
        try:
            on_stop_signals(raise_stop, STOP_SIGNALS)
            if waiting:
                raise_stop(waiting[0], None)
            reason = _watch(server, ports, name)
        except StopSignal as stopped:
            print(f"serve: {stopped}, answering what was accepted", file=sys.stderr)
            return 0 if _stop(server, EXIT_TIMEOUT_S + END_S) else 1
        finally:
            _stop(server, END_S)
            subprocess.run(clean_up, stderr=subprocess.DEVNULL)
            watcher.dismiss()
    raise ScriptError(reason)


def _start(command: Sequence[str], variables: Mapping[str, str], watcher: Watcher) -> subprocess.Popen[bytes]:
    """The server, known to the watcher."""
    server = subprocess.Popen(
        command,
        env={**os.environ, **variables},
        start_new_session=True,  # Ctrl-C reaches it through `_stop` only
    )
    watcher.kill_group_too(server.pid)
    return server


def _server_options(ports: Sequence[int]) -> list[str]:
    http, grpc, metrics = ports
    key = secrets.token_hex()  # no client knows it
    return [
        *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        "--disable-auto-complete-config",  # it would import PyTorch once more
        f"--http-restricted-api={','.join(CLOSED)}:closed={key}",
        f"--grpc-restricted-protocol={','.join(CLOSED)}:closed={key}",
    ]


def _watch(server: subprocess.Popen[bytes], ports: Sequence[int], name: str) -> str:
    """Returns when the server has ended, or a process of its backend; which of the two."""
    from lib.server.local_http import answers_ok

    url, grpc, metrics = f"http://127.0.0.1:{ports[0]}", *(f"127.0.0.1:{port}" for port in ports[1:])
    processes: set[int] | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"tritonserver ended with code {server.wait(POLL_S)}; its last lines are above"
        if processes is not None:
            if lost := processes - _backend_processes(server.pid):
                return f"the backend has lost {len(lost)} of {len(processes)} processes; ending the server"
        elif answers_ok(f"{url}/v2/health/ready", READY_TIMEOUT_S):
            processes = _backend_processes(server.pid)
            print(f"ready: {name}, {len(processes)} worker(s)")
            print(
                f"{url}/v2/models/{name}/infer   gRPC {grpc}   metrics http://{metrics}/metrics", flush=True
            )


def _backend_processes(server_pid: int) -> set[int]:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return {
            child.pid
            for child in psutil.Process(server_pid).children()
            if child.name() == STUB and child.status() != psutil.STATUS_ZOMBIE
        }
    return set()


def _stop(server: subprocess.Popen[bytes], patience_s: float) -> bool:
    """End the server and all its processes; whether it ended by itself within the time."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ended = True
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(patience_s)
        except subprocess.TimeoutExpired:
            ended = False
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    return ended


def _require_free(ports: Sequence[int]) -> None:
    from lib.server.process import is_listening

    if busy := [str(port) for port in ports if is_listening(port)]:
        raise ScriptError(f"another program listens on port {', '.join(busy)}; use --port or --any-port")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add_model_options(parser)
    add = parser.add_argument
    add("--port", type=first_port(3), default=8000, metavar="N", help="of HTTP; gRPC N+1, metrics N+2")
    add("--any-port", action="store_true", help="take three free ports")
    add("--mps", action="store_true", help="let several workers use a GPU at the same time (NVIDIA MPS)")
    add("tritonserver", nargs="*", metavar="OPTION", help="of tritonserver, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
