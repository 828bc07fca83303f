"""What /v2/health/live and /v2/health/ready say while a server works, fails and recovers."""

import contextlib
import os
import signal
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
import requests

from doubles.real_server import echo_server, wait_until, worker_pids

TIMEOUT_S = 60.0
# The promise of docs/front-end.md for the default settings: the window and the longest wait for an answer.
SEEN_S = 10.0


@pytest.fixture(scope="module")
def echo(project_dir, tmp_path_factory):
    """A server with the default settings of health, and a short queue."""
    model = {"batchSize": 2, "jobQueueSize": 4, "responseTimeout": 20}
    with echo_server(project_dir, tmp_path_factory.mktemp("health"), model) as server:
        yield server


def ask(server, question, method="GET"):
    address = f"{server.inference_url}/v2/health/{question}"
    return requests.request(method, address, timeout=TIMEOUT_S)


def is_ready(server):
    return ask(server, "ready").status_code == 200


def seconds_until(condition, what, limit_s):
    start = time.monotonic()
    wait_until(condition, what, limit_s)
    return time.monotonic() - start


@pytest.mark.parametrize("question", ["live", "ready"])
def test_a_server_that_works_is_live_and_ready(echo, question):
    answer = ask(echo, question)
    assert (answer.status_code, answer.json()) == (200, {question: True})
    assert answer.headers["Content-Type"] == "application/json"
    head = ask(echo, question, "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert ask(echo, question, "POST").status_code == 405


def test_a_question_keeps_the_connection(echo):
    parts = urlsplit(echo.inference_url)
    with socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S) as connection:
        for method in ("HEAD", "GET"):
            connection.sendall(f"{method} /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK")
            assert body == (b"" if method == "HEAD" else b'{"live":true}\n')


def test_health_is_no_matter_of_the_management_port(echo):
    assert requests.get(f"{echo.management_url}/v2/health/ready", timeout=TIMEOUT_S).status_code == 404


def test_a_loaded_server_with_a_full_queue_stays_ready(echo):
    stop, statuses, health = threading.Event(), [], []

    def load():
        while not stop.is_set():
            answer = requests.post(echo.echo_url, data={"sleep": "0.1"}, timeout=TIMEOUT_S)
            statuses.append(answer.status_code)
            if answer.status_code == 503:
                full.append((answer.json()["message"], answer.headers["Retry-After"]))

    full = []
    clients = [threading.Thread(target=load) for _ in range(16)]
    for client in clients:
        client.start()
    for _ in range(20):
        start = time.monotonic()
        health.append((ask(echo, "ready").status_code, time.monotonic() - start))
        time.sleep(0.2)
    stop.set()
    for client in clients:
        client.join(TIMEOUT_S)
    assert {status for status, _ in health} == {200}
    assert max(seconds for _, seconds in health) < 1.0  # answered from what is known, not by a worker
    assert set(statuses) == {200, 503}
    message, retry_after = full[0]
    assert "jobQueueSize" in message
    assert "4 requests wait" in message
    assert int(retry_after) > 0


def test_a_worker_that_hangs_turns_readiness_false(echo):
    (pid,) = worker_pids(echo)
    os.kill(pid, signal.SIGSTOP)
    try:
        seconds = seconds_until(lambda: not is_ready(echo), "readiness being false", 2 * SEEN_S)
        answer = ask(echo, "ready")
        assert answer.status_code == 503
        assert "no answer to the built-in image within 5 s" in answer.json()["models"]["echo"]
        assert int(answer.headers["Retry-After"]) > 0
        assert ask(echo, "live").status_code == 200
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: is_ready(echo), "readiness being true", 30.0)
    print(f"hung worker: not ready after {seconds:.1f} s")
    assert seconds < SEEN_S


def test_a_worker_that_dies_in_a_loop_turns_readiness_false(echo):
    stop = threading.Event()

    def kill():
        while not stop.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker_pids(echo)[0], signal.SIGKILL)
            time.sleep(0.5)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        seconds = seconds_until(lambda: not is_ready(echo), "readiness being false", 2 * SEEN_S)
        reason = ask(echo, "ready").json()["models"]["echo"]
        assert reason == "0 of 1 workers have loaded the model"
        assert ask(echo, "live").status_code == 200  # TorchServe starts it again
    finally:
        stop.set()
        killer.join(TIMEOUT_S)
    recovery = seconds_until(lambda: is_ready(echo), "readiness being true", 60.0)
    print(f"dying worker: not ready after {seconds:.1f} s, ready again {recovery:.1f} s after the last kill")
    assert seconds < SEEN_S
    assert requests.post(echo.echo_url, data=b"x", timeout=TIMEOUT_S).status_code == 200


def test_a_model_whose_workers_are_given_up_is_not_live_and_its_requests_are_refused(project_dir, tmp_path):
    with echo_server(project_dir, tmp_path, {"maxRetryTimeoutInSec": 0}) as server:
        assert is_ready(server)
        with contextlib.suppress(requests.RequestException):
            requests.post(server.echo_url, data={"exit": "1"}, timeout=TIMEOUT_S)
        wait_until(lambda: ask(server, "live").status_code == 503, "liveness being false", 20.0)
        assert "maxRetryTimeoutInSec" in ask(server, "live").json()["models"]["echo"]
        assert ask(server, "ready").status_code == 503
        answer = requests.post(server.echo_url, data=b"x", timeout=TIMEOUT_S)
        assert answer.status_code == 503
        assert "has no worker" in answer.json()["message"]
        assert int(answer.headers["Retry-After"]) > 0


def test_the_detector_answers_the_built_in_image(server):
    time.sleep(5.0)  # longer than front_end_health_window_s: no other answer counts
    answer = ask(server, "ready")
    assert (answer.status_code, answer.json()) == (200, {"ready": True})
