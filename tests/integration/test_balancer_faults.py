"""What clients see when one of three hosts fails: real servers with own addresses behind deploy/balancer."""

import contextlib
import signal
import time

import pytest
import requests

from lib.packaging.builder import ArchiveRequest, build_archive

from doubles.answers import BACKEND
from doubles.balancer import Balancer, Watch
from doubles.front_proxy import HAPROXY
from doubles.host_network import DRAIN_DELAY_S, HostNetwork
from doubles.real_server import wait_until
from doubles.steady_load import SteadyLoad

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed (Debian: apt install haproxy)"),
]

CLIENTS = 6
# Some 15 requests a second: the three hosts share the machine's cores.
PAUSE_S = 0.3
# Of the load before the event, and after the host is back.
CALM_S = 3.0
VICTIM = "b"


def store_of(folder, version):
    """A model store with the demo weights at a size that leaves the cores some rest."""
    build_archive(
        ArchiveRequest(
            output_dir=folder,
            version=version,
            model_settings={"batchSize": 4, "maxBatchDelay": 2, "minWorkers": 1, "maxWorkers": 1},
            serving={"backend": BACKEND, "precision": "fp32", "input_size_hw": [256, 320]},
        )
    )
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("store"), "1.0")


@pytest.fixture(scope="module")
def network(project_dir, tmp_path_factory, store):
    with HostNetwork(project_dir, tmp_path_factory.mktemp("hosts"), ["a", "b", "c"]) as made:
        for host in made.hosts.values():
            host.start(store)
            host.wait_until_ready()
        yield made


@pytest.fixture(scope="module")
def balancer(network, project_dir, tmp_path_factory):
    with Balancer(project_dir, tmp_path_factory.mktemp("balancer"), network.addresses()).running() as front:
        yield front


@pytest.fixture(scope="module")
def table():
    """Rows of the table in docs/scaling.md, printed at the end."""
    rows = []
    yield rows
    print(
        "\n\n| event | requests | lost | longest answer before, during | stopped sending after | back (s) |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


@contextlib.contextmanager
def load(balancer, network, smear):
    """Clients that compare every answer with that of a host asked directly."""
    hosts = list(network.hosts.values())
    wait_until(lambda: balancer.usable() == set(network.hosts), "all hosts", 60.0)
    direct = {
        requests.post(f"{host.url}/predictions/damoyolo", data=smear, timeout=60).content for host in hosts
    }
    assert len(direct) == 1
    steady = SteadyLoad(
        f"https://127.0.0.1:{balancer.port}/predictions/damoyolo",
        smear,
        CLIENTS,
        PAUSE_S,
        direct.pop(),
        verify=str(balancer.folder / "certificate/ca.pem"),
        headers=balancer.headers("inference"),
    )
    with steady, Watch(balancer, VICTIM) as watch:
        time.sleep(CALM_S)
        steady.mark()
        yield steady, watch
        time.sleep(CALM_S)
    assert steady.lost() == []


def is_back(balancer, watch):
    """Whether the victim is used again, and has been given requests."""
    since_s = time.monotonic()
    wait_until(lambda: VICTIM in balancer.usable(), "the host being used again", 120.0)
    back_s = time.monotonic() - since_s
    wait_until(lambda: watch.given_since(since_s + back_s) > 0, "requests for it", 30.0)
    return back_s


class Event:
    """Times of one event, for a row of the table."""

    def __init__(self, what, steady, watch):
        self.what, self.steady, self.watch = what, steady, watch
        self.began_s = time.monotonic()

    def row(self, ended_s, back):
        """A row. ended_s: when the cause was over; back: what is said about the return."""
        before = max(self.steady.waits_s(0.0, self.began_s - 0.5))
        during = max(self.steady.waits_s(self.began_s, ended_s))
        left_s = self.watch.left_s(self.began_s)
        last_s = self.watch.last_given_s(self.began_s, ended_s) - self.began_s
        left = "never" if left_s is None else f"{left_s - self.began_s:.1f}"
        return [
            self.what,
            str(self.steady.answered()),
            str(len(self.steady.lost())),
            f"{before:.2f}, {during:.2f}",
            f"{left} (last request {last_s:.1f})",
            back,
        ]


def test_a_host_that_is_cut_off_costs_no_request(balancer, network, smear, table):
    host = network.hosts[VICTIM]
    with load(balancer, network, smear) as (steady, watch):
        event = Event("cable pulled", steady, watch)
        host.cut_off()
        wait_until(lambda: VICTIM not in balancer.usable(), "the balancer noticing", 20.0)
        time.sleep(CALM_S)
        host.plug_in()
        ended_s = time.monotonic()
        back_s = is_back(balancer, watch)
    table.append(event.row(ended_s, f"{back_s:.1f} after the cable is in again"))


def test_a_host_that_is_killed_costs_no_request(balancer, network, store, smear, table):
    host = network.hosts[VICTIM]
    with load(balancer, network, smear) as (steady, watch):
        event = Event("all processes killed (SIGKILL)", steady, watch)
        host.kill()
        wait_until(lambda: VICTIM not in balancer.usable(), "the balancer noticing", 20.0)
        time.sleep(CALM_S)
        ended_s = time.monotonic()
        host.start(store)
        host.wait_until_ready()
        ready_s = time.monotonic() - ended_s
        back_s = is_back(balancer, watch)
    table.append(event.row(ended_s, f"{back_s:.1f} after ready; the start took {ready_s:.0f}"))


def test_a_host_that_stands_still_costs_no_request(balancer, network, smear, table):
    host = network.hosts[VICTIM]
    with load(balancer, network, smear) as (steady, watch):
        event = Event("all processes stopped (SIGSTOP)", steady, watch)
        host.signal_all(signal.SIGSTOP)
        try:
            wait_until(lambda: VICTIM not in balancer.usable(), "the balancer noticing", 40.0)
            time.sleep(CALM_S)
        finally:
            host.signal_all(signal.SIGCONT)
        ended_s = time.monotonic()
        back_s = is_back(balancer, watch)
    table.append(event.row(ended_s, f"{back_s:.1f} after they run again"))


SLOW = {
    "runs 20 ms of each 200 ms, for 15 s": lambda host: host.slowed(0.02, 0.18),
    "its network has 1 Mbit/s, for 15 s": lambda host: host.on_a_slow_cable("1mbit"),
}


@pytest.mark.parametrize("what", SLOW)
def test_a_slow_host_gets_less_and_costs_no_request(balancer, network, smear, table, what):
    with load(balancer, network, smear) as (steady, watch):
        event = Event(what, steady, watch)
        given_before = {name: int(row["stot"]) for name, row in balancer.states().items()}
        with SLOW[what](network.hosts[VICTIM]):
            time.sleep(15.0)
            given = {name: int(row["stot"]) - given_before[name] for name, row in balancer.states().items()}
        ended_s = time.monotonic()
    assert given[VICTIM] < min(given[name] for name in given if name != VICTIM)
    table.append(event.row(ended_s, f"requests for each host: {', '.join(map(str, given.values()))}"))


def test_hosts_are_updated_one_after_another_without_losing_a_request(
    balancer, network, tmp_path, smear, table
):
    """Each host drains, ends, and starts with another archive; the clients' answers stay equal."""
    new_store = store_of(tmp_path, "2.0")
    noticed, ends, totals = [], [], []
    with load(balancer, network, smear) as (steady, watch):
        event = Event("three hosts updated in turn", steady, watch)
        for name, host in network.hosts.items():
            began_s = time.monotonic()
            host.serve.send_signal(signal.SIGTERM)
            wait_until(
                lambda name=name: name not in balancer.usable(), "the balancer noticing", DRAIN_DELAY_S
            )
            noticed.append(time.monotonic() - began_s)
            assert host.serve.wait(120) == 0
            ends.append(time.monotonic() - began_s)
            host.start(new_store)
            host.wait_until_ready()
            wait_until(lambda name=name: name in balancer.usable(), f"{name} being used again", 60.0)
            totals.append(time.monotonic() - began_s)
        ended_s = time.monotonic()
    assert min(ends) >= DRAIN_DELAY_S
    assert b'"2.0"' in balancer.request("GET", "/v2/models/damoyolo")[2]
    row = event.row(ended_s, f"each {spread(totals)}, of which the drain {spread(ends)}")
    table.append([*row[:4], spread(noticed), row[5]])


def spread(seconds):
    return f"{min(seconds):.1f} to {max(seconds):.1f}"
