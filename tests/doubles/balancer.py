"""The HAProxy of deploy/balancer before several hosts, and what it says about them."""

import contextlib
import csv
import io
import re
import secrets
import socket
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

from doubles.front_proxy import TIMEOUT_S, FrontProxy
from doubles.real_server import wait_until


class Balancer(FrontProxy):
    """HAProxy with the shipped configuration for several hosts, on free ports.

    hosts: the address and port of each host by name.
    """

    def __init__(self, project_dir, folder, hosts, **environment):
        # Not in `folder`: the path of a socket has at most 97 characters.
        self.socket = Path(tempfile.gettempdir()) / f"damoyolo-{secrets.token_hex(4)}.sock"
        super().__init__(
            project_dir, folder, None, DAMOYOLO_BALANCER="1", DAMOYOLO_SOCKET=str(self.socket), **environment
        )
        self.hosts = hosts

    @contextlib.contextmanager
    def running(self):
        """HAProxy inside the context, with its socket."""
        try:
            with super().running():
                wait_until(self.socket.exists, "the stats socket", 10.0)
                yield self
        finally:
            self.socket.unlink(missing_ok=True)

    def _files(self):
        listed = self.folder / "hosts.cfg"
        lines = [f"    server {name} {address}\n" for name, address in self.hosts.items()]
        listed.write_text("".join(["backend torchserve from balanced\n", *lines]))
        shipped = self.project_dir / "deploy/balancer/balancer.cfg"
        return [*super()._files(), "-f", str(shipped), "-f", str(listed)]

    def worker(self):
        """Process id of the worker that takes new connections."""
        return int(re.search(r"(?m)^Pid: (\d+)$", self.ask("show info"))[1])

    def ask(self, command):
        """What the stats socket answers."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(self.socket))
            connection.sendall(f"{command}\n".encode())
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts).decode()

    def states(self):
        """By name of the host: its row of `show stat`."""
        rows = csv.DictReader(io.StringIO(self.ask("show stat").removeprefix("# ")))
        return {
            row["svname"]: row
            for row in rows
            if row["pxname"] == "torchserve" and row["svname"] not in ("FRONTEND", "BACKEND")
        }

    def given(self):
        """How many requests each host was given."""
        return [int(row["stot"]) for row in self.states().values()]

    def usable(self):
        """Names of the hosts that get requests."""
        return {name for name, row in self.states().items() if row["status"].startswith("UP")}


class Watch(threading.Thread):
    """Keeps the status of a host and how many requests it was given, while entered; 50 times a second."""

    def __init__(self, balancer, name):
        super().__init__(daemon=True)
        self.balancer, self.name = balancer, name
        self.seen = []  # time, status, requests
        self.over = threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join(10.0)

    def run(self):
        """Ask until the end."""
        while not self.over.wait(0.02):
            with contextlib.suppress(OSError):
                row = self.balancer.states()[self.name]
                self.seen.append((time.monotonic(), row["status"].split()[0], int(row["stot"])))

    def last_given_s(self, since_s, until_s):
        """When the host was given its last request within this time."""
        between = [row for row in self.seen if since_s <= row[0] <= until_s]
        changes = [after[0] for before, after in pairwise(between) if after[2] > before[2]]
        return max(changes, default=since_s)

    def left_s(self, since_s):
        """When the balancer first called it something else than UP."""
        return next((at for at, status, _ in self.seen if at >= since_s and status != "UP"), None)

    def given_since(self, since_s):
        """How many requests it was given after this time."""
        counts = [count for at, _, count in self.seen if at >= since_s]
        return counts[-1] - counts[0] if counts else 0
