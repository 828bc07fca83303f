"""Hosts with addresses of their own on one machine: a network namespace each, joined by a bridge. Needs root.

A host shares the cores, the memory and the files of the machine; all that it sends passes its virtual cable.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from doubles.network_namespaces import BRIDGES, ip, why_not
from doubles.real_server import wait_until

DRAIN_DELAY_S = 5


class Host:
    """A namespace with an address; at most one server at a time, started by scripts/serve.py."""

    def __init__(self, network, name, number):
        self.name = name
        self.project_dir, self.folder = network.project_dir, network.folder / name
        self.folder.mkdir()
        self.namespace, self.cable = f"{network.bridge}h{number}", f"{network.bridge}c{number}"
        self.ip = f"{network.subnet}.{number}"
        self.address = f"{self.ip}:8080"
        self.url = f"http://{self.address}"
        self.serve = None
        ip("netns", "add", self.namespace)

    def connect(self, bridge):
        """Lay its cable to the bridge."""
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("link", "set", self.cable, "master", bridge, "up")
        for arguments in (
            ["addr", "add", f"{self.ip}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            ip("-n", self.namespace, *arguments)

    def start(self, store, models="damoyolo.mar", core=None):
        """Serve this store; returns at once. core: the only one that the server may use."""
        text = (self.project_dir / "config.properties").read_text()
        # Reachable for the balancer; management and metrics stay inside the host.
        text = re.sub(r"(?m)^inference_address=.*$", f"inference_address={self.url}", text)
        text += f"\nfront_end_drain_delay_s={DRAIN_DELAY_S}\n"
        (self.folder / "config.properties").write_text(text)
        self.ready_file = self.folder / "ready"
        self.ready_file.unlink(missing_ok=True)
        serve = [sys.executable, "scripts/serve.py", "--ts-config", str(self.folder / "config.properties")]
        serve += ["--model-store", str(store), "--models", models, "--ready-file", str(self.ready_file)]
        if core is not None:
            serve = ["taskset", "-c", str(core), *serve]
        # `ip netns exec` gives it mounts of its own, too: each host has its own folder of logs.
        (self.folder / "logs").mkdir(exist_ok=True)
        (self.project_dir / "logs").mkdir(exist_ok=True)
        script = f'mount --bind "{self.folder}/logs" logs && exec "$@"'
        command = ["ip", "netns", "exec", self.namespace, "sh", "-c", script, "sh", *serve]
        with (self.folder / "output.txt").open("w") as output:
            self.serve = subprocess.Popen(
                command, cwd=self.project_dir, stdout=output, stderr=output, start_new_session=True
            )

    def wait_until_ready(self):
        """Return once its workers have loaded the model."""

        def is_ready():
            assert self.serve.poll() is None, (self.folder / "output.txt").read_text()
            return self.ready_file.exists() and self.ready_file.read_text() != ""

        wait_until(is_ready, f"{self.name} being ready")

    def processes(self):
        """Process ids of all that runs on it."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(line) for line in listed.stdout.split()]

    def signal_all(self, number):
        """Send a signal to each of its processes."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self):
        """SIGKILL to everything, as when the machine loses its power but not its network."""

        def are_gone():
            self.signal_all(signal.SIGKILL)
            return not self.processes()

        wait_until(are_gone, f"the end of all processes of {self.name}", 20.0)
        if self.serve is not None:
            self.serve.wait(20)

    def cut_off(self):
        """No packet comes to it or from it."""
        ip("link", "set", self.cable, "down")

    def plug_in(self):
        """The end of `cut_off`."""
        ip("link", "set", self.cable, "up")

    @contextlib.contextmanager
    def on_a_slow_cable(self, rate):
        """What is sent to it passes at this rate, as `tc` writes it, inside the context."""
        device = ["dev", self.cable, "root"]
        tbf = ["tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
        subprocess.run(["tc", "qdisc", "add", *device, *tbf], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["tc", "qdisc", "del", *device], check=True, capture_output=True)

    @contextlib.contextmanager
    def slowed(self, run_s, stop_s):
        """Its processes run for the first time and stand still for the second, in turn."""
        over = threading.Event()

        def take_turns():
            while not over.wait(run_s):
                self.signal_all(signal.SIGSTOP)
                over.wait(stop_s)
                self.signal_all(signal.SIGCONT)

        turns = threading.Thread(target=take_turns, daemon=True)
        turns.start()
        try:
            yield
        finally:
            over.set()
            turns.join()

    def remove(self):
        """End everything and take the namespace away."""
        try:
            self.kill()
        finally:
            ip("netns", "del", self.namespace)


class HostNetwork:
    """A bridge at `subnet`.254 and hosts at `subnet`.1 and so on, while entered; else the test is skipped.

    folder: gets a folder for each host, with settings, output and logs.
    """

    def __init__(self, project_dir, folder, names):
        self.project_dir, self.folder, self.names = project_dir, folder, names
        self.bridge = f"dy{os.getpid()}"
        self.subnet = BRIDGES
        self.hosts = {}

    def __enter__(self):
        if reason := why_not():
            pytest.skip(reason)
        # All that was made is taken away, after an error, too; what cannot be removed does not keep the rest.
        with contextlib.ExitStack() as made:
            ip("link", "add", self.bridge, "type", "bridge")
            made.callback(ip, "link", "del", self.bridge)
            ip("addr", "add", f"{self.subnet}.254/24", "dev", self.bridge)
            ip("link", "set", self.bridge, "up")
            for number, name in enumerate(self.names, start=1):
                host = self.hosts[name] = Host(self, name, number)
                made.callback(host.remove)
                host.connect(self.bridge)
            self._made = made.pop_all()
        return self

    def __exit__(self, *error):
        self._made.__exit__(*error)

    def addresses(self):
        """For the balancer: name to address and port."""
        return {name: host.address for name, host in self.hosts.items()}
