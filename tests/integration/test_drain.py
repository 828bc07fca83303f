"""What clients see of a server whose Java process gets SIGTERM."""

import signal
import socket
import threading
import time
from urllib.parse import urlsplit

import grpc
import pytest
import requests

from lib.cli import ScriptError

from doubles.echo_handler import echoed_field
from doubles.grpc_client import call, predictions_request
from doubles.real_server import echo_server, wait_until

TIMEOUT_S = 60.0
CLIENTS = 8
# TorchServe takes 4 to 6 s to end after the drain, on an idle machine.
END_S = 40.0


class Client(threading.Thread):
    """Sends one request after another until the server refuses it; keeps what came back."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url = url
        self.answers = []  # statuses
        self.refusal = None
        self.error = None

    def run(self):
        with requests.Session() as session:
            while self.refusal is None and self.error is None:
                try:
                    answer = session.post(self.url, data={"sleep": "0.05"}, timeout=TIMEOUT_S)
                except requests.RequestException as error:
                    self.error = error
                else:
                    self.answers.append(answer.status_code)
                    self.refusal = answer if answer.status_code != 200 else None


def begin(url, body, sent):
    """A connection on which the first `sent` bytes of a request's body were sent."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:sent])
    return connection


def read_to_end(connection):
    answer = b""
    with connection:
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.decode(), body


def terminate(server):
    server.java.send_signal(signal.SIGTERM)


def is_ready(server):
    return requests.get(f"{server.inference_url}/v2/health/ready", timeout=TIMEOUT_S).status_code == 200


def in_background(send):
    """A thread that calls `send`, and the list that gets its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(send()), daemon=True)
    thread.start()
    return thread, results


def slow_request(server, seconds):
    return in_background(
        lambda: requests.post(server.echo_url, data={"sleep": str(seconds)}, timeout=TIMEOUT_S)
    )


def require_refusal(answer):
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.headers["Connection"] == "close"
    assert answer.json()["type"] == "ServiceUnavailableException"


def test_a_drain_under_load_answers_or_refuses_every_request(project_dir, tmp_path):
    # Without a limit on the batch's first job, the slow request would stop the others, too.
    model = {"batchSize": 1, "minWorkers": 3, "maxWorkers": 3}
    with echo_server(project_dir, tmp_path, model, front_end_drain_grace_s=20) as server:
        clients = [Client(server.echo_url) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        wait_until(lambda: all(len(client.answers) > 20 for client in clients), "the load")
        slow, slow_answers = slow_request(server, 4)
        picture = bytes(range(256)) * 400
        upload = begin(server.echo_url, picture, 1000)
        time.sleep(0.5)
        terminate(server)
        start = time.monotonic()
        for client in clients:
            client.join(TIMEOUT_S)
        refused_s = time.monotonic() - start

        # While the slow request is under way:
        assert not slow_answers
        assert not is_ready(server)
        assert requests.get(f"{server.inference_url}/v2/health/live", timeout=TIMEOUT_S).status_code == 200
        assert requests.get(f"{server.management_url}/models", timeout=TIMEOUT_S).status_code == 200
        require_refusal(requests.post(server.echo_url, data=picture, timeout=TIMEOUT_S))
        require_refusal(requests.get(f"{server.inference_url}/ping", timeout=TIMEOUT_S))
        with pytest.raises(grpc.RpcError) as raised:
            call(
                int(server.properties["grpc_inference_port"]),
                "Predictions",
                predictions_request("echo", {"data": b"x"}),
            )
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        upload.sendall(picture[1000:])
        head, body = read_to_end(upload)
        assert head.startswith("HTTP/1.1 200 ")
        assert echoed_field(body, "body") == picture

        slow.join(TIMEOUT_S)
        server.java.wait(END_S)
        ended_s = time.monotonic() - start
    assert [answer.status_code for answer in slow_answers] == [200]
    assert [client.error for client in clients] == [None] * CLIENTS
    for client in clients:
        require_refusal(client.refusal)
        assert set(client.answers[:-1]) == {200}
    answered = sum(len(client.answers) for client in clients)
    print(f"{answered} requests, the last client refused after {refused_s:.2f} s, end after {ended_s:.1f} s")


@pytest.mark.slow
def test_after_a_delay_and_the_grace_period_what_is_open_gets_503(project_dir, tmp_path):
    settings = {"front_end_drain_delay_s": 2, "front_end_drain_grace_s": 1}
    with echo_server(project_dir, tmp_path, {"minWorkers": 2, "maxWorkers": 2}, **settings) as server:
        hanging, answers = slow_request(server, 50)
        time.sleep(0.5)
        terminate(server)
        wait_until(lambda: not is_ready(server), "readiness being false", 2.0)
        answer = requests.post(server.echo_url, data={"sleep": "0"}, timeout=TIMEOUT_S)
        assert (answer.status_code, answer.headers["Connection"]) == (200, "close")
        hanging.join(TIMEOUT_S)
        require_refusal_in_flight(answers)
        server.java.wait(END_S)


def require_refusal_in_flight(answers):
    assert [answer.status_code for answer in answers] == [503]
    assert "front_end_drain_grace_s" in answers[0].json()["message"]
    assert int(answers[0].headers["Retry-After"]) > 0


@pytest.mark.slow
def test_a_second_signal_cuts_the_drain_short(project_dir, tmp_path):
    with echo_server(project_dir, tmp_path, front_end_drain_grace_s=300) as server:
        hanging, answers = slow_request(server, 50)
        time.sleep(0.5)
        terminate(server)
        wait_until(lambda: not is_ready(server), "readiness being false", 10.0)
        start = time.monotonic()
        terminate(server)
        hanging.join(TIMEOUT_S)
        require_refusal_in_flight(answers)
        server.java.wait(END_S)
        print(f"second signal: end after {time.monotonic() - start:.1f} s")


@pytest.mark.parametrize(
    ("key", "value"), [("front_end_drain_grace_s", "soon"), ("front_end_drain_grace", "3")]
)
def test_a_wrong_setting_stops_the_start_with_an_explanation(project_dir, tmp_path, key, value):
    with (
        pytest.raises(ScriptError, match=f"Invalid configuration: .*{key}"),
        echo_server(project_dir, tmp_path, **{key: value}),
    ):
        pass
