"""Run TorchServe: start it, wait until it is ready or has failed, and stop all its processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import requests

from lib.archive.members import check_archive
from lib.cli import ScriptError
from lib.paths import PROJECT_DIR
from lib.server.dropping_output import DroppingOutput
from lib.server.gpus import require_device_indices
from lib.server.java import find_java_home
from lib.server.local_http import direct_session
from lib.server.watcher import Watcher

TRACEBACK_PATIENCE_S = 5.0
ADDRESS_KEYS = ("inference_address", "management_address", "metrics_address")
DEFAULT_ADDRESSES = dict(
    zip(ADDRESS_KEYS, map("http://127.0.0.1:{}".format, (8080, 8081, 8082)), strict=True)
)
GRPC_PORT_KEYS = {"grpc_inference_port": 7070, "grpc_management_port": 7071}
# The first of consecutive port numbers that name the sockets of the workers.
WORKER_PORT_KEY = "initial_worker_port"
# Printed by a worker that could not load its model, or by the server about it.
FAILURE_MARKS = (
    "Backend worker process died",
    "Load model failed",
    "Failed to load model",
    "Invalid configuration",
)
# Describing a model on a GPU host runs nvidia-smi once per worker, which takes seconds on some machines.
HTTP_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.5
LIVENESS_INTERVAL_S = 5.0
LIVENESS_TIMEOUT_S = 10.0
# A server that was killed a moment ago may still be giving its ports back.
PORTS_PATIENCE_S = 3.0
# Written by TorchServe's launcher into the temporary folder: the process id of Java.
PID_FILE = ".model_server.pid"
LONGEST_LINE = 65536
# Settings of the front end (docs/front-end.md), and how long it drains by default, in seconds.
DRAIN_TIMES = {"front_end_drain_delay_s": 0.0, "front_end_drain_grace_s": 30.0}
# Java halts at the latest this long after the drain.
JAVA_END_S = 25.0


def read_properties(path: Path) -> dict[str, str]:
    """The settings of a config.properties file, with the server's own addresses where it names none.

    Raises:
        ScriptError: it is not text.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ScriptError(f"{path} is not text in UTF-8: {error.reason}") from error
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {**DEFAULT_ADDRESSES, **{key.strip(): value.strip() for key, value in pairs}}


def ports_from(first: int, properties: Mapping[str, str]) -> dict[str, str]:
    """Settings of five ports in a row: inference, management, metrics, and gRPC; hosts as in `properties`."""
    addresses = {
        key: f"{properties[key].rsplit(':', 1)[0]}:{first + index}" for index, key in enumerate(ADDRESS_KEYS)
    }
    grpc = {key: str(first + len(ADDRESS_KEYS) + index) for index, key in enumerate(GRPC_PORT_KEYS)}
    return {**addresses, **grpc}


def local_url(address: str) -> str:
    """Where this machine reaches a server that listens on `address`: by its own for "every interface"."""
    return address.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def is_listening(port: int) -> bool:
    """Whether this port of 127.0.0.1 is taken."""
    with socket.socket() as probe:
        # Recently closed connections may linger on a free port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def busy_ports(properties: Mapping[str, str]) -> list[int]:
    """The ports in the settings that are already taken.

    Raises:
        ScriptError: a setting names no port.
    """
    ports = [_port(key, properties[key]) for key in ADDRESS_KEYS]
    ports += [_port(key, properties.get(key, str(default))) for key, default in GRPC_PORT_KEYS.items()]
    return [port for port in ports if is_listening(port)]


def _port(key: str, value: str) -> int:
    port = value.rsplit(":", 1)[-1]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ScriptError(f"{key} is {value!r}; accepted are ports, and addresses that end in :port")
    return int(port)


def describe_model(management_url: str, model_name: str) -> dict[str, Any]:
    """The management API's description of a model's default version."""
    with direct_session() as session:
        answer = session.get(f"{management_url}/models/{model_name}", timeout=HTTP_TIMEOUT_S)
    answer.raise_for_status()
    description: dict[str, Any] = answer.json()[0]
    return description


class TorchServeProcess:
    """A TorchServe and all its workers.

    config_file: server settings; relative paths in it are taken from the project's folder.
    model_store: folder of the archives.
    overrides: settings in place of those in the file.
    use_free_ports: take ports that are free in place of those in the settings.
    log_dir: where the server writes its logs.
    echo: gets a copy of what the server prints, as far as its stream takes it.
    arguments: further arguments of the `torchserve` command line.
    environment: variables for the server and its workers, in addition to those of this process.
    """

    def __init__(
        self,
        config_file: Path,
        model_store: Path,
        *,
        overrides: Mapping[str, str] | None = None,
        use_free_ports: bool = False,
        log_dir: Path | None = None,
        echo: DroppingOutput | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.properties = {**read_properties(config_file), **(overrides or {})}
        if use_free_ports:
            ports = free_ports(5)
            addresses = [f"http://127.0.0.1:{port}" for port in ports[:3]]
            self.properties.update(zip(ADDRESS_KEYS, addresses, strict=True))
            self.properties.update(zip(GRPC_PORT_KEYS, map(str, ports[3:]), strict=True))
        self.model_store = model_store
        self.inference_url, self.management_url, self.metrics_url = (
            local_url(self.properties[key]) for key in ADDRESS_KEYS
        )
        self._log_dir = log_dir
        self._echo = echo
        self._arguments = list(arguments)
        self._environment = dict(environment or {})
        self._printed: deque[str] = deque(maxlen=400)
        self._failed = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._private_dir: Path | None = None
        self._reader: threading.Thread | None = None
        self._watcher: Watcher | None = None
        self._killed = False

    @contextlib.contextmanager
    def running(self, timeout_s: float = 300.0) -> Iterator[TorchServeProcess]:
        """The server ready inside the context, and stopped afterwards.

        Raises:
            ScriptError, FileNotFoundError: as `start` and `wait_until_ready`.
        """
        try:
            self.start()
            self.wait_until_ready(timeout_s)
            yield self
        finally:
            self.stop()

    def start(self) -> None:
        """Start the server; returns at once.

        If this process is killed, a watcher ends the server and removes its temporary folder.

        Raises:
            ScriptError: an archive is missing or damaged, or a port is taken.
            FileNotFoundError: there is no Java runtime.
        """
        self._check_startable()
        # The server keeps its process id, sockets and unpacked archives in the temporary folder: with a
        # private one it does not collide with other servers.
        self._private_dir = Path(tempfile.mkdtemp(prefix="torchserve-"))
        self._watcher = Watcher(self._private_dir)
        self.properties.setdefault(WORKER_PORT_KEY, str(free_ports(1)[0]))
        config_file = self._private_dir / "config.properties"
        config_file.write_text("".join(f"{key}={value}\n" for key, value in self.properties.items()))
        command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs"]
        command += ["--model-store", str(self.model_store), "--ts-config", str(config_file), *self._arguments]
        self._process = subprocess.Popen(
            command,
            cwd=PROJECT_DIR,
            env=self._server_environment(self._private_dir),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A process group: the wrapper dies of a signal without ending Java, so `stop` signals all of it.
            start_new_session=True,
        )
        self._watcher.kill_group_too(self._process.pid)
        self._reader = threading.Thread(target=self._read_output, name="torchserve-output", daemon=True)
        self._reader.start()

    def _check_startable(self) -> None:
        require_device_indices({**os.environ, **self._environment})
        for archive in self.startup_archives():
            if not (self.model_store / archive).exists():
                raise ScriptError(
                    f"{self.model_store / archive} does not exist; scripts/build_archive.py makes it"
                )
        for path in self._archive_files():
            check_archive(path)
        deadline = time.monotonic() + PORTS_PATIENCE_S
        while (busy := busy_ports(self.properties)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if busy:
            raise ScriptError(
                f"another program listens on port {', '.join(map(str, busy))} of 127.0.0.1; stop it, or take "
                "other ports (the addresses in config.properties, or --port or --any-port here)"
            )

    def _server_environment(self, private_dir: Path) -> dict[str, str]:
        log_dir = str(self._log_dir or private_dir / "logs")
        environment = {
            **os.environ,
            **self._environment,
            "JAVA_HOME": str(find_java_home()),
            "TMPDIR": str(private_dir),
            "TEMP": str(private_dir),
            "LOG_LOCATION": log_dir,
            "METRICS_LOCATION": log_dir,
        }
        environment.pop("TS_CONFIG_FILE", None)  # it takes precedence over --ts-config
        return environment

    def startup_archives(self) -> list[str]:
        """File names of the archives that are loaded at start."""
        names = self.properties.get("load_models", "")
        if names.lower() in ("", "none", "all"):
            return []
        return [name.strip().rsplit("=", 1)[-1] for name in names.split(",")]

    def _archive_files(self) -> list[Path]:
        """The .mar files that are loaded at start."""
        if self.properties.get("load_models", "").lower() == "all":
            return sorted(self.model_store.glob("*.mar"))
        paths = (self.model_store / name for name in self.startup_archives())
        return [path for path in paths if path.suffix == ".mar" and path.is_file()]

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return once every worker of every model that is loaded at start has loaded it.

        Raises:
            ScriptError: the server ended, a worker failed to start, or time ran out; with the last output.
        """
        deadline = time.monotonic() + timeout_s
        expected = len(self.startup_archives())
        while True:
            if self._failed.is_set():
                # The worker's output comes by another way than the server's, on a busy machine seconds later.
                give_up = time.monotonic() + TRACEBACK_PATIENCE_S
                while "Traceback" not in self.last_output() and time.monotonic() < give_up:
                    time.sleep(0.1)
                time.sleep(1.0)  # the rest of it
                raise ScriptError(f"a worker could not start:\n{self.last_output()}")
            if self._process is None or self._process.poll() is not None:
                raise ScriptError(f"the server ended while it started:\n{self.last_output()}")
            if time.monotonic() > deadline:
                raise ScriptError(f"not ready within {timeout_s:.0f} s:\n{self.last_output()}")
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                names = self.model_names()
                if len(names) >= expected and all(self.is_ready(name) for name in names):
                    return
            time.sleep(POLL_INTERVAL_S)

    def model_names(self) -> list[str]:
        """Names of the registered models."""
        with direct_session() as session:
            answer = session.get(f"{self.management_url}/models?limit=100", timeout=HTTP_TIMEOUT_S)
        return [model["modelName"] for model in answer.json()["models"]]

    def is_ready(self, model_name: str) -> bool:
        """Whether all requested workers have loaded the model."""
        description = describe_model(self.management_url, model_name)
        workers = description["workers"]
        return len(workers) >= description["minWorkers"] and all(
            worker["status"] == "READY" for worker in workers
        )

    def wait(self) -> str:
        """Return when the server has ended, or only a new one helps; which of the two, for a message."""
        while self._process is not None and self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LIVENESS_INTERVAL_S)
                break
            if self._has_lost_a_model():
                return "a model has lost all its workers for good (/v2/health/live: 503); ending the server"
        return "the server ended by itself; its last lines are above"

    def _has_lost_a_model(self) -> bool:
        """Whether the front end says so; a server without its plugin or too busy to answer does not."""
        with contextlib.suppress(requests.RequestException), direct_session() as session:
            answer = session.get(f"{self.inference_url}/v2/health/live", timeout=LIVENESS_TIMEOUT_S)
            return answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE
        return False

    def stop(self) -> bool:
        """Let the server answer what it has accepted, end it and all its workers; whether that worked.

        If it takes longer than the front end's settings allow, it is killed, and requests under way are lost.
        """
        if self._process is not None:
            java = self._java_pid()
            with contextlib.suppress(ProcessLookupError):
                # To Java alone: its workers are still needed.
                os.kill(java, signal.SIGTERM) if java else os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._drain_s() + JAVA_END_S)
            drained = self._process.poll() is not None and not self._killed
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                if self._wait_for_group(5.0):
                    break
            if self._reader is not None:
                self._reader.join(timeout=5.0)
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None
        else:
            drained = True
        if self._private_dir is not None:
            shutil.rmtree(self._private_dir, ignore_errors=True)
            self._private_dir = None
        if self._watcher is not None:
            self._watcher.dismiss()
            self._watcher = None
        return drained

    def kill(self) -> None:
        """End the server and all its workers at once; only sends the signal, so `stop` has to follow."""
        self._killed = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _drain_s(self) -> float:
        """How long the front end may go on after the signal to end, in seconds."""
        try:
            return sum(float(self.properties.get(key, default)) for key, default in DRAIN_TIMES.items())
        except ValueError:  # the front end has refused it, too
            return sum(DRAIN_TIMES.values())

    def _java_pid(self) -> int:
        """Process id of Java; 0 before it has started."""
        assert self._private_dir is not None
        try:
            return int((self._private_dir / PID_FILE).read_text())
        except (OSError, ValueError):
            return 0

    def _wait_for_group(self, patience_s: float) -> bool:
        """Whether every process of the server's group has ended within the time."""
        assert self._process is not None
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            self._process.poll()
            try:
                os.killpg(self._process.pid, 0)
            except (ProcessLookupError, PermissionError):
                return True
            time.sleep(0.05)
        return False

    def _read_output(self) -> None:
        """Read all that the server prints: Java blocks, with all requests, if its output is not read on."""
        assert self._process is not None
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed while reading: the server was stopped
            while line := self._process.stdout.readline(LONGEST_LINE):
                line = line.rstrip("\n")
                self._printed.append(line)
                if any(mark in line for mark in FAILURE_MARKS):
                    self._failed.set()
                if self._echo is not None:
                    self._echo.print(line)

    def last_output(self) -> str:
        """The last lines that the server and its workers printed."""
        return "\n".join(self._printed)
