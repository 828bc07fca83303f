"""Namespaces for tests: reachable while they are needed, and nothing of them is left."""

import contextlib
import os
import re
import socket
import subprocess
import sys

import pytest

from doubles.network_namespaces import joined_namespace, why_not
from doubles.real_server import wait_until


@pytest.fixture(autouse=True)
def nothing_is_left():
    if (reason := why_not()) != "":
        pytest.skip(reason)
    before = made_here()
    yield
    assert made_here() == before


def made_here():
    """Namespaces and cables of this process."""
    shown = [
        subprocess.run(["ip", *what], capture_output=True, text=True).stdout for what in (["netns"], ["link"])
    ]
    return set(re.findall(rf"damoyolo-{os.getpid()}-\d+|dy{os.getpid()}c\d+", "".join(shown)))


def test_two_at_a_time_have_names_and_addresses_of_their_own():
    with joined_namespace() as one, joined_namespace() as other:
        assert one.name != other.name
        assert one.address != other.address
        assert len(made_here()) == 4


def test_the_namespace_of_a_process_gets_a_cable():
    """As for a container without a network."""
    server = [sys.executable, "-c", "import http.server as s; s.test(s.SimpleHTTPRequestHandler, port=8000)"]
    with subprocess.Popen(
        ["unshare", "--net", *server], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as alone:
        try:
            here = os.readlink("/proc/self/ns/net")
            wait_until(lambda: os.readlink(f"/proc/{alone.pid}/ns/net") != here, "a network of its own", 20)
            with joined_namespace(alone.pid) as namespace:
                wait_until(lambda: answers(namespace.address), "an answer", 20)
        finally:
            alone.kill()


def answers(address):
    with contextlib.suppress(OSError), socket.create_connection((address, 8000), timeout=5):
        return True
    return False


def test_what_fails_while_one_is_made_is_said():
    with (
        pytest.raises(AssertionError, match=r"^ip netns attach \S+ 999999999: "),
        joined_namespace(999999999),
    ):
        pass


def test_an_error_inside_is_raised_after_the_clean_up():
    with pytest.raises(RuntimeError, match="inside"), joined_namespace():
        raise RuntimeError("inside")
