"""The server's own part of /metrics: queue, answers and workers, of models that come and go."""

import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from doubles.echo_handler import write_echo_archive
from doubles.grpc_client import call, predictions_request
from doubles.real_server import echo_server, wait_until

TIMEOUT_S = 60
QUEUE_SIZE = 3


@pytest.fixture(scope="module")
def echo(project_dir, tmp_path_factory):
    """A server with a short queue, whose worker takes one request at a time."""
    model = {"batchSize": 1, "jobQueueSize": QUEUE_SIZE}
    folder = tmp_path_factory.mktemp("metrics")
    write_echo_archive(folder / "odd.mar", "odd", version="1.0 (b)")
    with echo_server(project_dir, folder, model, ["--enable-model-api"]) as server:
        server.folder = folder
        yield server


def read(server):
    """Values by name and labels, without those of the model."""
    text = requests.get(f"{server.metrics_url}/metrics", timeout=TIMEOUT_S).text
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("damoyolo_"):
                assert sample.labels.pop("model_name") == "echo"
                assert sample.labels.pop("model_version") == "1.0"
                values[(sample.name, *sample.labels.values())] = sample.value
    return values


def test_every_series_is_there_before_the_first_request(echo):
    values = read(echo)
    assert values["damoyolo_responses_total", "200"] == 0
    assert values["damoyolo_responses_total", "503"] == 0
    assert values["damoyolo_request_duration_seconds_count",] == 0
    assert values["damoyolo_queue_duration_seconds_bucket", "+Inf"] == 0
    assert values["damoyolo_queue_capacity_requests",] == QUEUE_SIZE
    assert values["damoyolo_workers", "model_loaded"] == values["damoyolo_workers_wanted",] == 1
    assert values["damoyolo_workers", "error"] == 0


def test_waiting_requests_are_counted_and_those_that_the_queue_refuses(echo):
    before = read(echo)
    asked = 2 * QUEUE_SIZE + 1  # one is in the worker, the queue is full, and the rest is refused
    seen = []
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            values = read(echo)
            seen.append((values["damoyolo_queue_requests",], values["damoyolo_requests_in_flight",]))

    def ask(_):
        return requests.post(echo.echo_url, files={"sleep": "0.5"}, timeout=TIMEOUT_S).status_code

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(asked) as pool:
        statuses = list(pool.map(ask, range(asked)))
    stop.set()
    watcher.join()
    assert set(statuses) == {200, 503}
    assert max(waiting for waiting, _ in seen) == QUEUE_SIZE
    assert max(in_flight for _, in_flight in seen) >= QUEUE_SIZE + 1  # a refused one for a moment, too
    after = read(echo)
    grown = {key: value - before[key] for key, value in after.items()}
    answered = statuses.count(200)
    assert grown["damoyolo_responses_total", "200"] == answered
    assert grown["damoyolo_responses_total", "503"] == asked - answered
    assert grown["damoyolo_queue_duration_seconds_count",] == answered
    assert grown["damoyolo_request_duration_seconds_count",] == answered
    # One after another: each takes at least the half second, and waits for those before it.
    assert grown["damoyolo_request_duration_seconds_bucket", "0.2"] == 0
    waits = sum(0.5 * place for place in range(answered))
    assert grown["damoyolo_queue_duration_seconds_sum",] >= 0.9 * waits
    assert after["damoyolo_queue_requests",] == after["damoyolo_requests_in_flight",] == 0


def test_statuses_of_the_handler_and_calls_of_grpc_are_counted(echo):
    before = read(echo)
    assert requests.post(echo.echo_url, files={"status": "418"}, timeout=TIMEOUT_S).status_code == 418
    grpc_port = int(echo.properties["grpc_inference_port"])
    call(grpc_port, "Predictions", predictions_request("echo", {"data": b"x"}))
    after = read(echo)
    assert after["damoyolo_responses_total", "418"] == 1
    assert after["damoyolo_responses_total", "200"] == before["damoyolo_responses_total", "200"] + 1


def test_requests_whose_client_leaves_are_counted_and_spared_the_worker(echo):
    before = read(echo)
    threads = [threading.Thread(target=leave, args=(echo,)) for _ in range(2)]  # one waits in the queue
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fields = {"data": b"x", "sleep": b"1"}
    grpc_port = int(echo.properties["grpc_inference_port"])
    with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
        call(grpc_port, "Predictions", predictions_request("echo", fields), timeout_s=0.3)
    wait_until(lambda: read(echo)["damoyolo_requests_in_flight",] == 0, "the end of all", TIMEOUT_S)
    grown = {key: value - before[key] for key, value in read(echo).items()}
    assert grown["damoyolo_responses_total", "499"] == 3
    assert grown["damoyolo_request_duration_seconds_count",] == grown["damoyolo_responses_total", "200"] == 0


def leave(server):
    """Sends a request that takes a second, and closes the connection before."""
    request = requests.Request("POST", server.echo_url, files={"sleep": "1"}).prepare()
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    address = re.match(r"http://(.*):(\d+)", server.echo_url).groups()
    with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
        connection.sendall(
            f"POST {request.path_url} HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode() + request.body
        )
        wait_until(lambda: read(server)["damoyolo_requests_in_flight",] >= 1, "the request", TIMEOUT_S)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def send(server, url, name, labels, value):
    """Let the worker increase a counter, and wait for it to be on the page."""
    assert requests.post(url, files={"metrics": json.dumps([[name, labels, value]])}, timeout=TIMEOUT_S).ok
    wait_until(lambda: name in page(server), name, TIMEOUT_S)


def page(server):
    return requests.get(f"{server.metrics_url}/metrics", timeout=TIMEOUT_S).text


def test_a_histogram_has_its_buckets_in_order_and_is_consistent_while_workers_write_it(echo):
    name = "damoyolo_stage_duration_seconds"
    bounds = ["0.001", "0.005", "0.01", "0.2", "1.0", "5.0", "+Inf"]
    # As read between the lines of a worker: large buckets and the count lack what small ones have.
    for stage in ("network", "parse"):
        for bound, value in zip(bounds, (1, 2, 3, 9, 9, 9, 7), strict=True):
            send(echo, echo.echo_url, f"{name}_bucket", ["echo", "1.0", stage, bound], value)
        send(echo, echo.echo_url, f"{name}_count", ["echo", "1.0", stage], 7)
        send(echo, echo.echo_url, f"{name}_sum", ["echo", "1.0", stage], 0.5)
    wait_until(lambda: page(echo).count(f"{name}_") == 2 * len(bounds) + 4, "all samples", TIMEOUT_S)
    (family,) = (each for each in text_string_to_metric_families(page(echo)) if each.name == name)
    assert family.type == "histogram"
    for samples in family.samples[: len(bounds) + 2], family.samples[len(bounds) + 2 :]:
        assert len({sample.labels["stage"] for sample in samples}) == 1
        assert [sample.labels.get("le") for sample in samples[: len(bounds)]] == bounds
        assert [sample.value for sample in samples[: len(bounds)]] == [1, 2, 3, 9, 9, 9, 9]
        rest = {sample.name: sample.value for sample in samples[len(bounds) :]}
        assert rest == {f"{name}_count": 9, f"{name}_sum": 0.5}


def test_metrics_of_a_worker_have_the_name_of_the_registration_and_the_whole_version(echo):
    models = f"{echo.management_url}/models"
    (echo.folder / "odd.mar").rename(echo.folder / "store" / "odd.mar")
    query = {"url": "odd.mar", "model_name": "cells", "initial_workers": "1", "synchronous": "true"}
    assert requests.post(models, params=query, timeout=TIMEOUT_S).status_code == 200
    try:
        url = echo.echo_url.replace("echo", "cells")
        send(echo, url, "damoyolo_detections_total", ["cells", "1.0__b_"], 3)
        expected = {"model_name": "cells", "model_version": "1.0 (b)"}
        families = text_string_to_metric_families(page(echo))
        assert [
            sample.labels
            for each in families
            for sample in each.samples
            if sample.value == 3 and sample.name == "damoyolo_detections_total"
        ] == [expected]
    finally:
        requests.delete(f"{models}/cells", timeout=TIMEOUT_S)


def test_a_request_for_a_model_that_is_not_there_adds_no_series(echo):
    before = read(echo)
    answer = requests.post(echo.echo_url.replace("echo", "nothing"), data=b"x", timeout=TIMEOUT_S)
    assert answer.status_code == 404
    assert read(echo).keys() == before.keys()


def test_a_model_that_is_unregistered_leaves_the_page(echo):
    models = f"{echo.management_url}/models"
    wait_until(lambda: read(echo)["damoyolo_workers", "model_loaded"] == 1, "the worker", 60)
    assert requests.delete(f"{models}/echo", timeout=TIMEOUT_S).status_code == 200
    assert read(echo) == {}
    query = {"url": "echo.mar", "initial_workers": "1", "synchronous": "true"}
    assert requests.post(models, params=query, timeout=TIMEOUT_S).status_code == 200
    # Counters go on, so that rate() has no gap to guess about.
    assert read(echo)["damoyolo_responses_total", "418"] == 1
