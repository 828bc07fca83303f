"""Every request ends, with an answer or after a time limit; slow clients lose their connection."""

import contextlib
import http.client
import json
import selectors
import socket
import threading
import time
from urllib.parse import urlsplit

import grpc
import numpy as np
import psutil
import pytest
import requests

from doubles.echo_handler import echoed_field
from doubles.grpc_client import call, predictions_request
from doubles.real_server import echo_server, wait_until

TIMEOUT_S = 60.0
HEADER_S, REQUEST_S, IDLE_S, ANSWER_S = 1, 2, 3, 5
# A busy machine with two cores: what a limit may be late.
LATE_S = 5.0


@pytest.fixture(scope="module")
def echo(project_dir, tmp_path_factory):
    """A server with short time limits."""
    settings = {
        "front_end_header_timeout_s": HEADER_S,
        "front_end_request_timeout_s": REQUEST_S,
        "front_end_idle_timeout_s": IDLE_S,
        "front_end_answer_timeout_s": ANSWER_S,
    }
    model = {"batchSize": 1, "minWorkers": 2, "maxWorkers": 2}
    folder = tmp_path_factory.mktemp("limits")
    with echo_server(project_dir, folder, model, ["--enable-model-api"], **settings) as server:
        yield server


def connect(server):
    parts = urlsplit(server.echo_url)
    return socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S)


def head(length, path="/predictions/echo"):
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def read_to_end(connection):
    """The answer, and the seconds until the server closed the connection."""
    start, answer = time.monotonic(), b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            answer += chunk
    return answer, time.monotonic() - start


def require_timeout(answer, setting):
    lines, _, body = answer.partition(b"\r\n\r\n")
    assert lines.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"connection: close" in lines
    assert setting in json.loads(body)["message"]


@pytest.mark.parametrize(
    ("sent", "setting", "limit_s"),
    [
        (b"P", "front_end_header_timeout_s", HEADER_S),
        (b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nA: b", "front_end_header_timeout_s", HEADER_S),
        (head(1000), "front_end_request_timeout_s", REQUEST_S),
        (head(1000) + b"x" * 999, "front_end_request_timeout_s", REQUEST_S),
    ],
)
def test_a_request_that_stops_arriving_gets_408(echo, sent, setting, limit_s):
    with connect(echo) as connection:
        connection.sendall(sent)
        answer, seconds = read_to_end(connection)
    require_timeout(answer, setting)
    assert limit_s - 0.1 < seconds < limit_s + LATE_S


@pytest.mark.parametrize(
    ("begin", "drop", "setting"),
    [
        (b"POST /predictions/echo HTTP/1.1\r\n", b"A: b\r\n", "front_end_header_timeout_s"),
        (head(100_000), b"x", "front_end_request_timeout_s"),
    ],
)
def test_a_request_that_arrives_in_drops_gets_408(echo, begin, drop, setting):
    with connect(echo) as connection:
        connection.sendall(begin)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                time.sleep(0.1)
                connection.sendall(drop)
                connection.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    if connection.recv(1, socket.MSG_PEEK):
                        break
        connection.settimeout(TIMEOUT_S)
        require_timeout(read_to_end(connection)[0], setting)


def test_a_slow_upload_that_goes_on_is_accepted(echo):
    body = bytes(1000) * 100
    with connect(echo) as connection:
        connection.sendall(head(len(body)))
        start = time.monotonic()
        for at in range(0, len(body), 2500):  # 25 kB/s
            connection.sendall(body[at : at + 2500])
            time.sleep(0.1)
        assert time.monotonic() - start > REQUEST_S
        answer = connection.recv(100)
    assert answer.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("first", [b"", b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_an_idle_connection_is_closed(echo, first):
    with connect(echo) as connection:
        connection.sendall(first)
        answer, seconds = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200 OK") == bool(first)
    assert IDLE_S - 0.1 < seconds < IDLE_S + LATE_S


def test_a_request_that_waits_for_its_answer_is_no_idle_connection(echo):
    answer = requests.post(echo.echo_url, data={"sleep": str(IDLE_S + 1)}, timeout=TIMEOUT_S)
    assert answer.status_code == 200


@pytest.mark.slow
def test_an_answer_that_nobody_reads_does_not_stay(echo):
    body = bytes(20_000_000)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        parts = urlsplit(echo.echo_url)
        connection.connect((parts.hostname, parts.port))
        port = connection.getsockname()[1]
        connection.sendall(head(len(body)) + body)

        def is_held():
            return any(
                each.raddr and each.raddr.port == port and each.status == psutil.CONN_ESTABLISHED
                for each in echo.java.net_connections("tcp")
            )

        assert is_held()
        wait_until(lambda: not is_held(), "the connection being closed", ANSWER_S + IDLE_S + 2 * LATE_S)


def test_a_late_answer_is_replaced_by_504_and_does_no_harm(echo):
    parts = urlsplit(echo.echo_url)
    start = time.monotonic()
    answer = requests.post(echo.echo_url, data={"sleep": str(ANSWER_S + 2)}, timeout=TIMEOUT_S)
    seconds = time.monotonic() - start
    assert answer.status_code == 504
    assert "front_end_answer_timeout_s" in answer.json()["message"]
    assert answer.headers["Connection"] == "close"
    assert ANSWER_S - 0.1 < seconds < ANSWER_S + LATE_S
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    with contextlib.closing(connection):  # over the time of the late answer
        for number in range(40):
            connection.request("POST", parts.path, b"%d" % number)
            assert echoed_field(connection.getresponse().read(), "body") == b"%d" % number
            time.sleep(0.1)


@pytest.mark.slow
def test_a_late_answer_over_grpc_is_deadline_exceeded(echo):
    port = int(echo.properties["grpc_inference_port"])
    with pytest.raises(grpc.RpcError) as raised:
        call(port, "Predictions", predictions_request("echo", {"sleep": b"%d" % (ANSWER_S + 2)}))
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "front_end_answer_timeout_s" in raised.value.details()


def test_a_client_that_leaves_costs_the_others_little_time(echo):
    """TorchServe alone computes what nobody waits for: here 20 s, on two workers."""
    body, form = b"sleep=2", b"Content-Type: application/x-www-form-urlencoded\r\n"
    for _ in range(20):
        with connect(echo) as connection:
            connection.sendall(head(len(body)).replace(b"Host", form + b"Host") + body)
            time.sleep(0.01)
    assert requests.post(echo.echo_url, data=b"x", timeout=TIMEOUT_S).status_code == 200


def mutated_requests(count):
    """A request with bytes replaced, removed or cut off."""
    random = np.random.default_rng(10)
    request = head(300) + random.bytes(300)
    for _ in range(count):
        changed = bytearray(request)
        for _ in range(random.integers(1, 8)):
            at = int(random.integers(len(changed)))
            changed[at : at + int(random.integers(3))] = random.bytes(int(random.integers(3)))
        yield bytes(
            changed[: int(random.integers(1, len(changed) + 1))] if random.random() < 0.5 else changed
        )


@pytest.mark.slow
def test_no_mutated_request_waits_for_good(echo):
    open_connections = selectors.DefaultSelector()
    for request in mutated_requests(500):
        connection = connect(echo)
        connection.setblocking(False)
        connection.send(request)
        open_connections.register(connection, selectors.EVENT_READ)
    answers, deadline = {}, time.monotonic() + 3 * (ANSWER_S + IDLE_S) + LATE_S
    while open_connections.get_map() and time.monotonic() < deadline:
        for key, _ in open_connections.select(1.0):
            data = b""
            with contextlib.suppress(ConnectionError):
                data = key.fileobj.recv(65536)
            if data:
                answers.setdefault(key.fd, data)
            else:
                open_connections.unregister(key.fileobj)
                key.fileobj.close()
    statuses = [answer.split(b" ", 2)[1] for answer in answers.values()]
    print({status: statuses.count(status) for status in set(statuses)})
    assert not open_connections.get_map()
    assert requests.post(echo.echo_url, data=b"x", timeout=TIMEOUT_S).status_code == 200


def test_unregistering_under_load_answers_every_request(echo):
    """The last test of the module, which leaves no model."""
    stop, outcomes = threading.Event(), []

    def load():
        while not stop.is_set():
            try:
                answer = requests.post(echo.echo_url, data={"sleep": "0.2"}, timeout=TIMEOUT_S)
                outcomes.append(answer.status_code)
            except requests.RequestException as error:
                outcomes.append(type(error).__name__)

    clients = [threading.Thread(target=load) for _ in range(8)]
    for client in clients:
        client.start()
    time.sleep(2.0)
    start = time.monotonic()
    answer = requests.delete(f"{echo.management_url}/models/echo", timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    seconds = time.monotonic() - start
    time.sleep(1.0)
    stop.set()
    for client in clients:
        client.join(ANSWER_S + 2 * LATE_S)
        assert not client.is_alive()
    print({outcome: outcomes.count(outcome) for outcome in set(outcomes)}, f"in {seconds:.1f} s")
    assert outcomes.count(200) > 0
    # 500: the worker of the batch in computation is killed.
    assert set(outcomes) <= {200, 404, 500, 503}
    health = requests.get(f"{echo.inference_url}/v2/health/ready", timeout=TIMEOUT_S)
    assert (health.status_code, health.json()["reason"]) == (503, "no model is registered")
