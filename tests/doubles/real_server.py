"""Settings of a real TorchServe for tests, and waiting for it."""

import re
import time

from lib.server.process import ADDRESS_KEYS, GRPC_PORT_KEYS, WORKER_PORT_KEY, free_ports, is_listening


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
