"""Figures of docs/scaling.md: real hosts behind deploy/balancer, and what a request costs it. By hand:

    python -m pytest tests/integration/measure_balancer.py -s

Needs root, two cores, haproxy, wrk and model_store/damoyolo.mar. The name keeps it out of the runs of the
tests.
"""

import contextlib
import subprocess

import psutil

from lib.paths import MODEL_STORE
from lib.server.process import free_ports

from doubles.balancer import Balancer
from doubles.balancer_rates import before_hosts, rate_of
from doubles.front_proxy import HAPROXY
from doubles.host_network import HostNetwork

NAMES = ["a", "b"]


def test_real_hosts_with_a_core_each(project_dir, tmp_path, smear):
    """The archive of the model store on one host and on two, each with a core that others use, too."""
    with HostNetwork(project_dir, tmp_path, NAMES) as network:
        for core, host in enumerate(network.hosts.values()):
            host.start(MODEL_STORE, core=core)
        for host in network.hosts.values():
            host.wait_until_ready()
        for turn, count in enumerate((1, 2, 1)):
            folder = tmp_path / f"balancer{turn}"
            with before_hosts(network, folder, NAMES[:count]) as balancer:
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
    before, cpu_before = sum(balancer.given()), sum(process.cpu_times()[:2])
    command = ["taskset", "-c", "0", "wrk", "-t1", "-c16", "-d8s", "-s", str(script), url]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "Non-2xx" not in printed
    assert "Socket errors" not in printed
    return sum(balancer.given()) - before, sum(process.cpu_times()[:2]) - cpu_before, 8.0


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
