"""The rate of several hosts behind deploy/balancer."""

import contextlib
import time

from doubles.balancer import Balancer
from doubles.real_server import wait_until
from doubles.steady_load import SteadyLoad

SECONDS = 10.0


def rate_of(balancer, path, body, clients):
    """Answers a second within SECONDS, and how many requests each host was given."""
    wait_until(lambda: balancer.usable() == set(balancer.hosts), "all hosts", 60.0)
    trust = {
        "verify": str(balancer.folder / "certificate/ca.pem"),
        "headers": balancer.headers("inference"),
    }
    with SteadyLoad(f"https://127.0.0.1:{balancer.port}{path}", body, clients, **trust) as load:
        time.sleep(2.0)  # connections, and a first batch on each host
        before, given_before = load.answered(), balancer.given()
        started = time.monotonic()
        time.sleep(SECONDS)
        rate = (load.answered() - before) / (time.monotonic() - started)
        each = [after - former for after, former in zip(balancer.given(), given_before, strict=True)]
    assert load.lost() == []
    return rate, each


@contextlib.contextmanager
def before_hosts(network, folder, names):
    """A balancer before these hosts."""
    folder.mkdir()
    addresses = {name: network.hosts[name].address for name in names}
    with Balancer(network.project_dir, folder, addresses).running() as balancer:
        yield balancer
