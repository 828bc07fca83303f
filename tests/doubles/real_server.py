"""Settings of a real TorchServe for tests, and waiting for it."""

import contextlib
import re
import time

import psutil
import requests

from lib.server.process import (
    ADDRESS_KEYS,
    GRPC_PORT_KEYS,
    WORKER_PORT_KEY,
    TorchServeProcess,
    free_ports,
    is_listening,
)

from doubles.echo_handler import write_echo_archive


def wait_until(condition, what, timeout_s=240.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:.0f} s"
        time.sleep(0.1)


def config_with_free_ports(project_dir, folder):
    """The project's config.properties with other ports, and the three addresses."""
    ports = free_ports(6)
    addresses = [f"http://127.0.0.1:{port}" for port in ports[:3]]
    text = (project_dir / "config.properties").read_text()
    for key, address in zip(ADDRESS_KEYS, addresses, strict=True):
        text = re.sub(rf"(?m)^{key}=.*$", f"{key}={address}", text)
    for key, port in zip([*GRPC_PORT_KEYS, WORKER_PORT_KEY], ports[3:], strict=True):
        text += f"\n{key}={port}\n"
    path = folder / "config.properties"
    path.write_text(text)
    return path, addresses


def ports_in_use(addresses):
    return [address for address in addresses if is_listening(int(address.rsplit(":", 1)[1]))]


@contextlib.contextmanager
def echo_server(project_dir, folder, model_config=None, arguments=(), **overrides):
    """A server of its own with the echo handler; further settings of the model and of config.properties."""
    store, log_dir = folder / "store", folder / "logs"
    store.mkdir()
    write_echo_archive(store / "echo.mar", "echo", **(model_config or {}))
    server = TorchServeProcess(
        project_dir / "config.properties",
        store,
        overrides={"load_models": "echo.mar", **{key: str(value) for key, value in overrides.items()}},
        use_free_ports=True,
        log_dir=log_dir,
        arguments=arguments,
    )
    server.echo_url = f"{server.inference_url}/predictions/echo"
    with server.running(120.0):
        server.java = next(process for process in psutil.process_iter() if _logs_to(process, log_dir))
        yield server


def _logs_to(process, log_dir):
    with contextlib.suppress(psutil.Error):
        return process.name() == "java" and process.environ().get("LOG_LOCATION") == str(log_dir)
    return False


def worker_pids(server):
    """The process ids of the workers of the echo model; that of a worker that starts may be an old one."""
    description = requests.get(f"{server.management_url}/models/echo", timeout=60.0).json()[0]
    return [worker["pid"] for worker in description["workers"]]
