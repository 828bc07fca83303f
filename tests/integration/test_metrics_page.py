"""The server's own part of /metrics: queue, answers and workers, of models that come and go."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from doubles.grpc_client import call, predictions_request
from doubles.real_server import echo_server, wait_until

TIMEOUT_S = 60
QUEUE_SIZE = 3


@pytest.fixture(scope="module")
def echo(project_dir, tmp_path_factory):
    """A server with a short queue, whose worker takes one request at a time."""
    model = {"batchSize": 1, "jobQueueSize": QUEUE_SIZE}
    folder = tmp_path_factory.mktemp("metrics")
    with echo_server(project_dir, folder, model, ["--enable-model-api"]) as server:
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
