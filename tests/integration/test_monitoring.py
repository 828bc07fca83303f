"""Prometheus reads a running server, and every expression of deploy/monitoring and of the docs has data.

DAMOYOLO_DASHBOARD_PNG=docs/dashboard.png keeps the picture of the dashboard.
"""

import contextlib
import math
import os
import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from doubles.monitoring import (
    draw_dashboard,
    fill_in,
    read_annotations,
    read_panels,
    running_prometheus,
    without_threshold,
)
from doubles.real_server import wait_until

TIMEOUT_S = 60
LOAD_S = 25
CLIENTS = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None,
        reason="needs prometheus and promtool (Debian package prometheus)",
    ),
]


@pytest.fixture(scope="module")
def monitoring_dir(project_dir):
    return project_dir / "deploy" / "monitoring"


@pytest.fixture(scope="module")
def prometheus(server, smear, monitoring_dir, tmp_path_factory):
    """Prometheus after some seconds of load: good images, one in ten that is none, and a wrong option."""
    folder = tmp_path_factory.mktemp("prometheus")
    url = server.predictions_url
    stop = threading.Event()

    def client(number):
        with requests.Session() as session:
            for count in range(10**6):
                if stop.is_set():
                    return
                body = b"no image" if (count + number) % 10 == 0 else smear
                header = {"X-Detect-Score-Threshold": "two"} if (count + number) % 25 == 1 else {}
                session.post(url, data=body, headers=header, timeout=TIMEOUT_S)

    time.sleep(2)  # what workers counted before is on the page then
    with running_prometheus(monitoring_dir, folder, server.metrics_url) as running:
        running.before = samples_of(page(server))
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(client, number) for number in range(CLIENTS)]
            stop.wait(LOAD_S)
            stop.set()
            for each in clients:
                each.result()
        running.ended_at = time.time()
        yield running


def page(server):
    return requests.get(f"{server.metrics_url}/metrics", timeout=TIMEOUT_S).text


def finite_values(series):
    return [float(value) for each in series for _, value in each["values"] if math.isfinite(float(value))]


def needs_gpu(expression):
    return "gpu_memory" in expression and not torch.cuda.is_available()


def test_every_panel_has_data(prometheus, monitoring_dir):
    for title, _, targets in read_panels(monitoring_dir / "dashboard.json"):
        for expression, _ in targets:
            if not needs_gpu(expression):
                assert finite_values(prometheus.query_range(expression)), f"{title}: {expression}"


def test_every_annotation_and_alert_has_data_but_for_its_threshold(prometheus, monitoring_dir):
    rules = yaml.safe_load((monitoring_dir / "rules.yml").read_text())["groups"][0]["rules"]
    expressions = [rule["expr"] for rule in rules] + read_annotations(monitoring_dir / "dashboard.json")
    for expression in map(without_threshold, expressions):
        if not needs_gpu(expression):
            assert finite_values(prometheus.query_range(expression)), expression


def test_prometheus_evaluates_every_rule(prometheus):
    wait_until(lambda: all(rule["health"] == "ok" for rule in prometheus.rules()), "evaluation of rules", 20)
    # The load breaks nothing but what its clients do wrong.
    assert {rule["name"] for rule in prometheus.rules() if rule["state"] == "firing"} == set()


def test_every_query_of_the_documentation_has_data(prometheus, project_dir):
    text = (project_dir / "docs/monitoring.md").read_text()
    queries = re.findall(r"```promql\n(.*?)```", text, re.DOTALL)
    assert len(queries) > 5
    for query in queries:
        expression = fill_in(re.sub(r"#.*", "", query).replace("[5m]", "[10s]"))
        if not needs_gpu(expression):
            assert finite_values(prometheus.query_range(without_threshold(expression))), query


def test_the_queue_was_seen_and_is_empty_after_the_load(prometheus, server):
    assert finite_values(prometheus.query_range("max_over_time(damoyolo_queue_requests[40s])"))
    (most,) = prometheus.query("max_over_time(damoyolo_queue_requests[60s])")
    assert 0 < float(most["value"][1]) <= CLIENTS
    samples = samples_of(page(server))
    assert samples["damoyolo_queue_requests", ()] == 0
    assert samples["damoyolo_requests_in_flight", ()] == 0
    assert samples["damoyolo_workers", (("state", "model_loaded"),)] == 1


def samples_of(text):
    """The value of each of our samples, by name and its labels but the model's."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("damoyolo_"):
                labels = sample.labels.items() - {("model_name", "damoyolo"), ("model_version", "1.0")}
                samples[sample.name, tuple(sorted(labels))] = sample.value
    return samples


def test_workers_and_server_count_the_same_answers(prometheus, server):
    def growth():
        grown = {
            key: value - prometheus.before.get(key, 0) for key, value in samples_of(page(server)).items()
        }
        answers, errors = {}, {}
        for (name, labels), value in grown.items():
            counts = {"damoyolo_responses_total": answers, "damoyolo_request_errors_total": errors}.get(name)
            if counts is not None and value:
                code = dict(labels)["code"]
                counts[code] = counts.get(code, 0) + value
        return grown, answers, errors

    wait_until(lambda: growth()[0]["damoyolo_queue_requests", ()] == 0, "the end of the load", 10)
    time.sleep(1.5)  # a worker sends once a second
    grown, answers, errors = growth()
    good = answers.pop("200")
    assert errors == answers
    assert errors.keys() == {"400", "415"}
    assert grown["damoyolo_requests_total", ()] == good + sum(errors.values())
    assert grown["damoyolo_batch_size_sum", ()] == grown["damoyolo_requests_total", ()]
    assert grown["damoyolo_worker_request_duration_seconds_count", ()] == grown["damoyolo_requests_total", ()]
    assert (
        grown["damoyolo_images_total", (("decoder", "cpu"),)]
        + grown.get(("damoyolo_images_total", (("decoder", "gpu"),)), 0)
        == good
    )


def test_histograms_are_whole(server, prometheus):
    families = [each for each in text_string_to_metric_families(page(server)) if each.type == "histogram"]
    histograms = [family for family in families if family.name.startswith("damoyolo_")]
    assert {family.name.removeprefix("damoyolo_") for family in histograms} == {
        "batch_size",
        "queue_duration_seconds",
        "request_duration_seconds",
        "stage_duration_seconds",
        "worker_request_duration_seconds",
    }
    for family in histograms:
        series = {}
        for sample in family.samples:
            labels = dict(sample.labels)
            le = labels.pop("le", None)
            part = le if le else sample.name.rpartition("_")[2]
            series.setdefault(tuple(sorted(labels.items())), {})[part] = sample.value
        for parts in series.values():
            total, count = parts.pop("sum"), parts.pop("count")
            bounds = sorted(parts, key=float)
            values = [parts[bound] for bound in bounds]
            assert bounds[-1] == "+Inf"
            assert values == sorted(values)
            assert values[-1] == count > 0
            assert total > 0


def test_promtool_finds_nothing_in_our_metrics(server, prometheus):
    ours = "".join(line + "\n" for line in page(server).splitlines() if re.match(r"(# \w+ )?damoyolo_", line))
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=ours, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_one_metric_can_be_asked_for(server):
    text = requests.get(
        f"{server.metrics_url}/metrics", params={"name[]": "damoyolo_queue_requests"}, timeout=TIMEOUT_S
    ).text
    assert {line.split("{")[0] for line in text.splitlines() if line[0] != "#"} == {"damoyolo_queue_requests"}


def test_the_dashboard_can_be_drawn(prometheus, monitoring_dir, tmp_path):
    path = Path(os.environ.get("DAMOYOLO_DASHBOARD_PNG", tmp_path / "dashboard.png"))
    draw_dashboard(prometheus, monitoring_dir / "dashboard.json", path)
    assert 10_000 < path.stat().st_size < 150_000


def test_a_new_worker_in_place_of_another_goes_on_with_the_same_series(server, smear, prometheus):
    assert requests.post(server.predictions_url, data=smear, timeout=TIMEOUT_S).status_code == 200
    starts = ("damoyolo_worker_starts_total", ())
    batches = ("damoyolo_batch_size_count", ())
    wait_until(lambda: samples_of(page(server))["damoyolo_requests_total", ()] > 0, "the first counters", 10)
    before = samples_of(page(server))
    (worker,) = requests.get(f"{server.management_url}/models/damoyolo", timeout=TIMEOUT_S).json()[0][
        "workers"
    ]
    psutil.Process(worker["pid"]).kill()
    wait_until(lambda: samples_of(page(server))[starts] == before[starts] + 1, "another worker", 90)
    with contextlib.suppress(requests.RequestException):
        requests.post(server.predictions_url, data=smear, timeout=TIMEOUT_S)
    wait_until(lambda: samples_of(page(server))[batches] > before[batches], "a batch of that worker", 30)
    after = samples_of(page(server))
    assert after.keys() == before.keys()
    growing = [key for key in before if re.search(r"_(total|bucket|count|sum)$", key[0])]
    assert all(after[key] >= before[key] for key in growing)
    (started,) = (key for key in after if key[0] == "damoyolo_worker_start_time_seconds")
    assert after[started] > before[started]
