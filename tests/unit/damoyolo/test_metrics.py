"""What a worker counts, and how it names itself."""

import time

import torch

from damoyolo.errors import InternalError, RequestError, UnsupportedImageError
from damoyolo.metrics import COUNTERS, GAUGES, HISTOGRAMS, WorkerMetrics, process_start_time, read_worker_id
from damoyolo.structures import Work

MODEL = ("m", "1.0")


def metrics_that_send_to(sent, model=MODEL):
    """Only when they are told to."""
    metrics = WorkerMetrics(
        lambda name, labels, value: sent.update({(name, labels): value}), model, torch.device("cpu")
    )
    metrics.totals._interval_s, metrics.totals._sent_at = 3600.0, time.monotonic()
    return metrics


def test_a_worker_starts_every_series_with_zero():
    sent = {}
    before = time.time()
    metrics_that_send_to(sent).report_start()
    assert sent.pop(("damoyolo_worker_starts_total", MODEL)) == 1
    started_at = sent.pop(("damoyolo_worker_start_time_seconds", (*MODEL, "unknown")))
    assert started_at <= before
    assert 0 <= sent.pop(("damoyolo_worker_load_duration_seconds", (*MODEL, "unknown"))) < 86_400
    assert set(sent.values()) == {0}
    histograms = {f"{name}{suffix}" for name in HISTOGRAMS for suffix in ("_sum", "_count", "_bucket")}
    assert {name for name, _ in sent} == (COUNTERS.keys() | histograms) - {"damoyolo_worker_starts_total"}
    assert ("damoyolo_request_errors_total", (*MODEL, "UnsupportedImage", "415")) in sent
    stages = {labels[2] for name, labels in sent if name == "damoyolo_stage_duration_seconds_count"}
    assert stages == {"parse", "preprocess", "network", "postprocess", "respond"}


def test_a_batch_is_counted_by_requests_images_errors_and_stages():
    sent = {}
    metrics = metrics_that_send_to(sent)
    errors = [UnsupportedImageError(""), InternalError(""), UnsupportedImageError("")]
    metrics.count_batch(6, errors, Work(2, 1, 40), 0.25, {"network": 0.02})
    metrics.count_batch(1, [], Work(1, 0, 2), 0.06, {"network": 0.01})
    metrics.totals.flush()
    assert sent["damoyolo_requests_total", MODEL] == 7
    assert sent["damoyolo_images_total", (*MODEL, "cpu")] == 3
    assert sent["damoyolo_images_total", (*MODEL, "gpu")] == 1
    assert sent["damoyolo_detections_total", MODEL] == 42
    assert sent["damoyolo_request_errors_total", (*MODEL, "UnsupportedImage", "415")] == 2
    assert sent["damoyolo_request_errors_total", (*MODEL, "InternalError", "500")] == 1
    assert sent["damoyolo_batch_size_sum", MODEL] == 7
    assert sent["damoyolo_batch_size_count", MODEL] == 2
    # Every request of a batch waits for the whole batch.
    assert sent["damoyolo_worker_request_duration_seconds_count", MODEL] == 7
    assert sent["damoyolo_worker_request_duration_seconds_bucket", (*MODEL, "0.1")] == 1
    assert sent["damoyolo_stage_duration_seconds_bucket", (*MODEL, "network", "0.01")] == 1


def test_a_worker_sends_few_lines_whatever_it_counted():
    # A line costs about 20 us here and 5 us in the server: 130 lines a second are 0.3 % of a core.
    lines = []
    metrics = metrics_that_send_to({})
    metrics.report_start()
    metrics.totals._send = lambda *line: lines.append(line)
    for seconds in (0.0005, 0.004, 0.03, 0.3, 4, 20):
        errors = [error("") for error in RequestError.__subclasses__()]
        stages = dict.fromkeys(("parse", "preprocess", "network", "postprocess", "respond"), seconds)
        metrics.count_batch(64, errors, Work(1, 1, 1), seconds, stages)
    metrics.totals.flush()
    assert 100 < len(lines) < 130


def test_a_gpu_s_memory_is_sent_with_the_counters(monkeypatch):
    sent = {}
    metrics = metrics_that_send_to(sent)
    monkeypatch.setattr(metrics, "_device", torch.device("cuda", 1))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (30 * device.index, 80))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 10 * device.index)
    metrics.report_start()
    assert sent["damoyolo_worker_gpu_memory_bytes", (*MODEL, "unknown")] == 10
    assert sent["damoyolo_gpu_memory_used_bytes", ("1",)] == 50
    assert sent["damoyolo_gpu_memory_capacity_bytes", ("1",)] == 80
    assert sent["damoyolo_images_total", (*MODEL, "gpu")] == 0


def test_names_and_labels_follow_the_rules_of_prometheus():
    for name, metric in (COUNTERS | HISTOGRAMS | GAUGES).items():
        assert name.startswith("damoyolo_")
        assert name.islower()
        assert name.endswith("_total") == (name in COUNTERS)
        assert all(label.islower() for label in metric.labels)
        if metric.unit != "Count":
            assert name.endswith(f"_{metric.unit.lower()}")
        assert sorted(set(metric.buckets)) == list(metric.buckets)


def test_a_version_cannot_break_the_line_that_carries_it():
    sent = {}
    metrics_that_send_to(sent, ("m", "1,0|:x")).report_start()
    assert {labels[1] for _, labels in sent} == {"1_0__x"}


def test_a_worker_has_the_id_of_its_socket():
    assert read_worker_id(["w.py", "--sock-type", "unix", "--sock-name", "/tmp/.ts.sock.9001"]) == "9001"
    assert read_worker_id(["w.py", "--sock-type", "tcp", "--port", "9002"]) == "9002"
    assert read_worker_id(["pytest", "--port"]) == "unknown"


def test_the_start_of_this_process_is_in_the_past_and_does_not_move():
    first, second = process_start_time(), process_start_time()
    assert first < time.time()
    assert abs(second - first) < 1  # clocks are read one after the other


def test_every_kind_of_error_has_a_status_of_its_own():
    kinds = {}
    for error in [RequestError, *RequestError.__subclasses__()]:
        assert kinds.setdefault(error.kind, error.status) == error.status
