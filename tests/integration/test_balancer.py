"""What deploy/balancer sends again, to whom, and what it does not: HAProxy before stand-ins for the hosts."""

import contextlib
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from damoyolo_client.answers import ServerAnswerError
from damoyolo_client.client import Client
from doubles.balancer import Balancer
from doubles.front_proxy import HAPROXY, TIMEOUT_S, FrontProxy
from doubles.real_server import wait_until
from doubles.stand_in_server import Reply, StandInServer, failed, found
from doubles.steady_load import SteadyLoad

pytestmark = pytest.mark.skipif(
    HAPROXY is None, reason="haproxy is not installed (Debian: apt install haproxy)"
)

MODEL = "/predictions/damoyolo"
REQUESTS = 8
# tune.bufsize of balancer.cfg; HAProxy keeps 1,024 bytes of it free, and the head needs some.
BUFFER_BYTES = 262_144
SPARE_BYTES = 4_096


class StandInHost(StandInServer):
    """A host that is ready or not, and answers images with `reply`."""

    def __init__(self, reply=None):
        super().__init__(self._host_answer)
        self.reply = reply or found()
        self.ready, self.ready_after_s = True, 0.0
        self.held = threading.Event()
        self.held.set()

    def _host_answer(self, asked):
        if asked.method == "GET":
            time.sleep(self.ready_after_s)
            return Reply(200 if self.ready else 503)
        self.held.wait(30.0)
        return self.reply

    def images(self):
        """How many it was sent."""
        return sum(asked.method == "POST" for asked in self.asked)


@pytest.fixture
def hosts():
    with StandInHost() as first, StandInHost() as second:
        yield first, second


@pytest.fixture
def balancer(hosts, project_dir, tmp_path):
    addresses = {host.base_url: host.base_url.removeprefix("http://") for host in hosts}
    named = dict(zip("ab", addresses.values(), strict=True))
    with Balancer(project_dir, tmp_path, named).running() as front:
        # A new HAProxy takes its hosts for usable at once; after the first checks it knows.
        wait_until(lambda: is_checked(front), "the first checks", 10.0)
        yield front


def is_checked(front):
    return all(row["check_status"].startswith("L7") for row in front.states().values())


def statuses(balancer, body=b"image"):
    return [balancer.request("POST", MODEL, body)[0] for _ in range(REQUESTS)]


def test_haproxy_accepts_the_configuration_without_a_warning(project_dir, tmp_path):
    checked = Balancer(project_dir, tmp_path, {"a": "127.0.0.1:9"}).check()
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr


def test_the_example_of_the_hosts_is_accepted(project_dir, tmp_path, monkeypatch):
    front = Balancer(project_dir, tmp_path, {})
    example = str(project_dir / "deploy/balancer/hosts.cfg")
    files = [*front._files()[:-1], example]
    monkeypatch.setattr(front, "_files", lambda: files)
    assert front.check().returncode == 0


def test_requests_go_to_all_hosts_and_need_a_token(balancer, hosts):
    assert statuses(balancer) == [200] * REQUESTS
    assert [host.images() for host in hosts] == [REQUESTS // 2] * 2
    assert balancer.request("POST", MODEL, b"image", token=None)[0] == 401
    assert balancer.request("GET", "/metrics")[0] == 404


def test_operations_see_the_metrics_of_the_balancer_and_no_management(balancer):
    port = balancer.operations_port
    status, _, page = balancer.request("GET", "/metrics", token="operations", port=port)
    assert (status, b"haproxy_server_status" in page) == (200, True)
    assert balancer.request("GET", "/models", token="operations", port=port)[0] == 404


@pytest.mark.parametrize("value", ["0", ""])
def test_only_1_makes_the_front_that_of_several_hosts(project_dir, tmp_path, value):
    assert FrontProxy(project_dir, tmp_path, None, DAMOYOLO_BALANCER=value).check().returncode == 0


@pytest.mark.parametrize("reply", [failed(503, "Unavailable", "full"), Reply(drop=True)], ids=["503", "drop"])
def test_what_a_host_refuses_or_drops_is_answered_by_another(balancer, hosts, reply):
    bad, good = hosts
    bad.reply = reply
    assert statuses(balancer, bytes(BUFFER_BYTES - SPARE_BYTES)) == [200] * REQUESTS
    assert bad.images() > 0
    assert good.images() == REQUESTS
    log = balancer.log.read_text()
    assert " host b retries +1" in log  # the plus: another host


def test_a_body_beyond_the_buffer_is_not_sent_again(balancer, hosts):
    bad, good = hosts
    bad.reply = Reply(drop=True)
    answers = [balancer.request("POST", MODEL, bytes(BUFFER_BYTES + 1)) for _ in range(REQUESTS)]
    lost = [answer for answer in answers if answer[0] != 200]
    assert len(lost) == bad.images() > 0
    assert good.images() == REQUESTS - len(lost)
    for status, headers, body in lost:
        assert (status, json.loads(body)["code"], headers["Retry-After"]) == (502, 502, "2")


def test_an_error_of_an_image_is_not_tried_on_another_host(balancer, hosts):
    for host in hosts:
        host.reply = failed(507, "InternalServerException", "Worker died.")
    assert statuses(balancer) == [507] * REQUESTS
    assert sum(host.images() for host in hosts) == REQUESTS


def test_only_an_unexpected_failure_is_hidden(balancer, hosts):
    """The client sends an image again whose worker died, and has to read so."""
    for message, shown in (
        ("Worker died.", "Worker died."),
        ("java.lang.Secret", "the server failed"),
        ("java.lang.Secret: Worker died.", "the server failed"),
    ):
        for host in hosts:
            host.reply = failed(500, "InternalServerException", message)
        status, _, body = balancer.request("POST", MODEL, b"image")
        assert (status, json.loads(body)["message"].startswith(shown)) == (500, True)


def test_the_client_of_this_project_sends_again_what_the_balancer_cannot(balancer, hosts):
    """Images beyond the buffer whose host drops them: 502, and the client tries again."""
    bad, _ = hosts
    bad.reply = Reply(drop=True)
    url = f"https://127.0.0.1:{balancer.port}"
    trust = {"token": balancer.tokens["inference"], "ca_file": balancer.folder / "certificate/ca.pem"}
    with Client(url, pause_s=0.01, **trust) as client:
        outcomes = list(client.detect_many([bytes(BUFFER_BYTES + 1)] * REQUESTS, in_flight=2))
        assert [outcome.error for outcome in outcomes] == [None] * REQUESTS
        assert client.repeated == bad.images() > 0
    with Client(url, **{**trust, "token": "wrong"}) as client, pytest.raises(ServerAnswerError, match="401"):
        client.detect(b"image")


def test_a_host_that_nobody_listens_on_costs_no_request_whatever_its_size(balancer, hosts):
    gone, _ = hosts
    gone.__exit__()
    assert statuses(balancer, bytes(10 * BUFFER_BYTES)) == [200] * REQUESTS
    wait_until(lambda: balancer.usable() == {"b"}, "the balancer noticing", 10.0)


def test_a_host_that_is_not_ready_gets_nothing_new_and_finishes_what_it_has(balancer, hosts):
    draining, other = hosts
    draining.held.clear()
    other.held.clear()
    answers = []
    sent = [
        threading.Thread(target=lambda: answers.append(balancer.request("POST", MODEL, b"image")[0]))
        for _ in range(2)
    ]
    for each in sent:
        each.start()
    wait_until(lambda: draining.images() == other.images() == 1, "a request for each", 10.0)
    other.held.set()
    draining.ready = False
    wait_until(lambda: balancer.usable() == {"b"}, "the balancer noticing", 10.0)
    assert statuses(balancer) == [200] * REQUESTS
    assert draining.images() == 1
    draining.held.set()
    for each in sent:
        each.join(30.0)
    assert answers == [200, 200]
    draining.ready = True
    wait_until(lambda: balancer.usable() == {"a", "b"}, "the host being used again", 10.0)


@pytest.mark.slow
def test_a_host_whose_readiness_takes_its_time_keeps_its_requests(balancer, hosts):
    """An idle or busy host answers after front_end_health_timeout_s (5 s) at the latest."""
    busy, other = hosts
    other.ready = False
    wait_until(lambda: balancer.usable() == {"a"}, "the balancer noticing", 10.0)
    busy.held.clear()
    busy.ready_after_s = 5.0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(balancer.request, "POST", MODEL, b"image")
        time.sleep(12.0)  # two checks
        assert balancer.usable() == {"a"}
        busy.held.set()
        assert answer.result()[0] == 200
    assert busy.images() == 1


def test_a_client_of_the_old_process_is_told_that_hosts_are_ready(balancer):
    """It sees no hosts any more, and answers the next request of each of its connections."""
    address = ("127.0.0.1", balancer.port)
    connection = http.client.HTTPSConnection(*address, context=balancer.context, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        for _ in range(2):
            connection.request("GET", "/v2/health/ready")
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())) == (200, {"ready": True})
            balancer.reload()
    assert answer.headers["Connection"] == "close"  # so it was the old one


def test_a_reload_with_another_host_costs_no_request(balancer, hosts):
    """Clients with and without a pause: on idle connections and on busy ones."""
    url = f"https://127.0.0.1:{balancer.port}{MODEL}"
    trust = {
        "verify": str(balancer.folder / "certificate/ca.pem"),
        "headers": balancer.headers("inference"),
    }
    with StandInHost() as third:
        busy = SteadyLoad(url, b"image", 2, 0.0, **trust)
        idle = SteadyLoad(url, b"image", 4, 0.1, **trust)
        with busy, idle:
            wait_until(lambda: idle.answered() > 8, "the load", 10.0)
            balancer.hosts["c"] = third.base_url.removeprefix("http://")
            for _ in range(3):
                balancer.reload()
            wait_until(lambda: third.images() > 0, "requests for the new host", 10.0)
        assert (busy.lost(), idle.lost()) == ([], [])


def test_while_no_host_is_ready_clients_are_told_to_come_back(balancer, hosts):
    for host in hosts:
        host.ready = False
    wait_until(lambda: not balancer.usable(), "the balancer noticing", 10.0)
    assert balancer.request("GET", "/v2/health/ready", token=None)[0] == 503
    status, headers, _ = balancer.request("POST", MODEL, b"image")
    assert (status, headers["Retry-After"]) == (503, "2")
    hosts[0].ready = True
    wait_until(lambda: balancer.request("POST", MODEL, b"image")[0] == 200, "an answer", 10.0)
