"""Rates behind deploy/balancer with one, two and three hosts; -s prints them."""

import pytest

from doubles.balancer_rates import before_hosts, rate_of
from doubles.echo_handler import write_echo_archive
from doubles.front_proxy import HAPROXY
from doubles.host_network import HostNetwork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed (Debian: apt install haproxy)"),
]
NAMES = ["a", "b", "c"]
# Of a request to an echo host, which computes nothing meanwhile.
SERVICE_S = 0.1


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
            with before_hosts(network, folder, NAMES[:count]) as balancer:
                rates[count], each = rate_of(balancer, "/predictions/echo", {"sleep": str(SERVICE_S)}, 24)
            print(f"{count} host(s) of {SERVICE_S} s: {rates[count]:.1f} requests/s, for each {each}")
            assert max(each) <= 1.5 * min(each)
    # At most what the hosts can do; and more with each further one.
    assert all(rate <= 1.05 * count / SERVICE_S for count, rate in rates.items())
    assert rates[1] < rates[2] < rates[3]
