"""Rates behind deploy/balancer with one, two and three hosts, and what a request costs it; -s prints them."""

import contextlib
import os
import shutil
import subprocess
import time

import psutil
import pytest

from lib.paths import MODEL_STORE
from lib.server.process import free_ports

from doubles.balancer import Balancer
from doubles.echo_handler import write_echo_archive
from doubles.front_proxy import HAPROXY
from doubles.host_network import HostNetwork
from doubles.real_server import wait_until
from doubles.steady_load import SteadyLoad

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed (Debian: apt install haproxy)"),
]
NAMES = ["a", "b", "c"]
SECONDS = 10.0
# Of a request to an echo host, which computes nothing meanwhile.
SERVICE_S = 0.1


def rate_of(balancer, path, body, clients):
    """Answers a second within SECONDS, and how many requests each host was given."""
    wait_until(lambda: balancer.usable() == set(balancer.hosts), "all hosts", 60.0)
    trust = {
        "verify": str(balancer.folder / "certificate/ca.pem"),
        "headers": balancer.headers("inference"),
    }
    with SteadyLoad(f"https://127.0.0.1:{balancer.port}{path}", body, clients, **trust) as load:
        time.sleep(2.0)  # connections, and a first batch on each host
        before, given_before = load.answered(), given(balancer)
        started = time.monotonic()
        time.sleep(SECONDS)
        rate = (load.answered() - before) / (time.monotonic() - started)
        each = [after - former for after, former in zip(given(balancer), given_before, strict=True)]
    assert load.lost() == []
    return rate, each


def given(balancer):
    return [int(row["stot"]) for row in balancer.states().values()]


@contextlib.contextmanager
def before_hosts(network, project_dir, folder, names):
    """A balancer before these hosts."""
    folder.mkdir()
    addresses = {name: network.hosts[name].address for name in names}
    with Balancer(project_dir, folder, addresses).running() as balancer:
        yield balancer


def test_the_rate_grows_with_the_number_of_hosts(project_dir, tmp_path):
    """Each host takes one request at a time and 0.1 s for it, without needing a core."""
    store = tmp_path / "store"
    store.mkdir()
    write_echo_archive(store / "echo.mar", "echo", batchSize=1)
    rates = {}
    with HostNetwork(project_dir, tmp_path, NAMES) as network:
        for host in network.hosts.values():
            host.start(store, "echo.mar")
        for host in network.hosts.values():
            host.wait_until_ready()
        for count in (1, 2, 3):
            folder = tmp_path / f"balancer{count}"
            with before_hosts(network, project_dir, folder, NAMES[:count]) as balancer:
                rates[count], each = rate_of(balancer, "/predictions/echo", {"sleep": str(SERVICE_S)}, 24)
            print(f"{count} host(s) of {SERVICE_S} s: {rates[count]:.1f} requests/s, for each {each}")
            assert max(each) <= 1.5 * min(each)
    # At most what the hosts can do; and more with each further one.
    assert all(rate <= 1.05 * count / SERVICE_S for count, rate in rates.items())
    assert rates[1] < rates[2] < rates[3]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two cores are needed")
def test_real_hosts_with_a_core_each(project_dir, tmp_path, smear):
    """The archive of the model store on one host and on two, each with a core that others use, too."""
    if not (MODEL_STORE / "damoyolo.mar").exists():
        pytest.skip("no model_store/damoyolo.mar; scripts/build_archive.py makes it")
    with HostNetwork(project_dir, tmp_path, NAMES[:2]) as network:
        for core, host in enumerate(network.hosts.values()):
            host.start(MODEL_STORE, core=core)
        for host in network.hosts.values():
            host.wait_until_ready()
        for turn, count in enumerate((1, 2, 1)):
            folder = tmp_path / f"balancer{turn}"
            with before_hosts(network, project_dir, folder, NAMES[:count]) as balancer:
                rate, each = rate_of(balancer, "/predictions/damoyolo", smear, 8 * count)
            print(f"{count} host(s) with a core each: {rate:.2f} images/s, requests for each {each}")


BACKEND = """
global
    maxconn 1000
    nbthread 1
    tune.bufsize 262144
defaults
    mode http
    timeout client 30s
    timeout server 30s
    timeout connect 5s
frontend swallow
    bind 127.0.0.1:{port}
    option http-buffer-request
    http-request return status 200 content-type application/json string '{{"ready":true}}'
"""
PLAIN = """
global
    nbthread 1
frontend plain from common
    bind 127.0.0.1:{port}
    default_backend torchserve
"""
SCRIPT = """
wrk.method = "POST"
wrk.body = string.rep("x", {size})
wrk.headers["Authorization"] = "Bearer {token}"
"""


@contextlib.contextmanager
def swallowing_host(folder):
    """A host that reads a request and answers at once: an HAProxy on core 0; its port."""
    port = free_ports(1)[0]
    (folder / "backend.cfg").write_text(BACKEND.format(port=port))
    command = ["taskset", "-c", "0", HAPROXY, "-db", "-f", str(folder / "backend.cfg")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait(20)


class OneCoreBalancer(Balancer):
    """One thread, and a second port without TLS, tokens and limits."""

    def _files(self):
        self.plain_port = free_ports(1)[0]
        (self.folder / "plain.cfg").write_text(PLAIN.format(port=self.plain_port))
        return [*super()._files(), "-f", str(self.folder / "plain.cfg")]

    def pin(self, core):
        """Keep HAProxy on this core; its process."""
        process = psutil.Process(self.worker())
        process.cpu_affinity([core])
        return process


def cost(process, balancer, url, script):
    """Requests, CPU seconds of HAProxy and seconds of `wrk` on core 0 with 16 connections."""
    before, cpu_before = sum(given(balancer)), sum(process.cpu_times()[:2])
    command = ["taskset", "-c", "0", "wrk", "-t1", "-c16", "-d8s", "-s", str(script), url]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "Non-2xx" not in printed
    assert "Socket errors" not in printed
    return sum(given(balancer)) - before, sum(process.cpu_times()[:2]) - cpu_before, 8.0


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed (Debian: apt install wrk)")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two cores are needed")
def test_what_a_request_costs_the_balancer(project_dir, tmp_path):
    """CPU time of HAProxy alone, so that the load generator on the other core may be what limits."""
    with swallowing_host(tmp_path) as port:
        front = OneCoreBalancer(project_dir, tmp_path, {"a": f"127.0.0.1:{port}"}, DAMOYOLO_LOG="127.0.0.1:9")
        with front.running():
            process = front.pin(1)
            urls = {"TLS": f"https://127.0.0.1:{front.port}", "plain": f"http://127.0.0.1:{front.plain_port}"}
            for size in (32_000, 60_000, 110_000):
                script = tmp_path / f"{size}.lua"
                script.write_text(SCRIPT.format(size=size, token=front.tokens["inference"]))
                for name, url in urls.items():
                    count, cpu_s, seconds = cost(process, front, f"{url}/predictions/damoyolo", script)
                    assert count > 0
                    print(
                        f"{size} bytes, {name}: {count / seconds:.0f} requests/s with {cpu_s / seconds:.0%} "
                        f"of a core, {1e6 * cpu_s / count:.0f} us each; a whole core: {count / cpu_s:.0f} "
                        f"requests/s, {count * size / cpu_s / 1e9:.2f} GB/s"
                    )
