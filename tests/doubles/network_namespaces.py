"""Network namespaces of this machine, each with an address and a virtual cable. They need root."""

import contextlib
import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass

# Of 198.18.0.0/15, which is set aside for tests of networks: one half for cables, the other for bridges.
CABLES, BRIDGES = f"198.18.{os.getpid() % 256}", f"198.19.{os.getpid() % 256}"
# A cable takes four addresses.
MAX_CABLES = 64
_numbers = itertools.count()


@dataclass(frozen=True)
class Namespace:
    """name: as `ip netns` has it. address: its own, reachable from this machine."""

    name: str
    address: str


def why_not():
    """Why there can be no network namespaces here; empty if there can."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and the command ip"
    name = f"dytry{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=30).returncode:
        return "this machine lets nobody make network namespaces"
    ip("netns", "del", name)
    return ""


def ip(*arguments):
    """Run the command ip; an error says what it printed."""
    done = subprocess.run(["ip", *map(str, arguments)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(map(str, arguments))}: {done.stderr.strip()}"


@contextlib.contextmanager
def joined_namespace(pid=None):
    """A namespace at the other end of a cable, inside the context: a new one, or that of a process.

    It reaches this machine's end of the cable and nothing else.
    """
    number = next(_numbers) % MAX_CABLES
    name, cable = f"damoyolo-{os.getpid()}-{number}", f"dy{os.getpid()}c{number}"
    here, there = f"{CABLES}.{4 * number + 1}", f"{CABLES}.{4 * number + 2}"
    with contextlib.ExitStack() as made:
        ip("netns", *(["add", name] if pid is None else ["attach", name, pid]))
        made.callback(ip, "netns", "del", name)
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        # Before the namespace, which lives on while a process is in it.
        made.callback(ip, "link", "del", cable)
        ip("addr", "add", f"{here}/30", "dev", cable)
        ip("link", "set", cable, "up")
        ip("-n", name, "addr", "add", f"{there}/30", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        yield Namespace(name, there)
