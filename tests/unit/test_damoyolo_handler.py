"""The entry point in TorchServe's own service class, wire format included, without a server."""

import contextlib
import json
import logging
import operator
import os
import re
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import ts
import yaml
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.service import Service

from damoyolo.config import ServingConfig
from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE
from damoyolo.metrics import COUNTERS, GAUGES, HISTOGRAMS
from damoyolo.model.checkpoint import load_checkpoint, save_packaged
from damoyolo_handler import DamoYoloHandler, _leave_out_undeclared_times


@pytest.fixture(scope="module")
def model_dir(project_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_packaged(
        folder / WEIGHTS_FILE, load_checkpoint(project_dir / "model_store/weights/damoyolo_s_bccd.pth")
    )
    handler = {"variant": "S", "class_names": ["Platelets", "RBC", "WBC"], "precision": "fp32"}
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump({"minWorkers": 1, "handler": handler}))
    return folder


@pytest.fixture(scope="module")
def service(model_dir, project_dir):
    metrics = MetricsCacheYamlImpl(str(project_dir / "deploy/metrics.yaml"))
    metrics.initialize_cache()
    manifest = {"model": {"modelName": "damoyolo", "configFile": SETTINGS_FILE}}
    handler = DamoYoloHandler()
    threads = torch.get_num_threads()
    made = Service("cells", str(model_dir), manifest, handler.handle, None, 8, metrics_cache=metrics)
    made.set_cl_socket(None)
    made.handler = handler
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TS_DECODE_INPUT_REQUEST", "true")  # the handler changes it; restored afterwards
        handler.initialize(made.context)
        assert os.environ["TS_DECODE_INPUT_REQUEST"] == "false"
        yield made
    logging.captureWarnings(False)
    handler.service.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def smear(project_dir):
    return (project_dir / "tests/data/smears/smear_3.jpg").read_bytes()


def test_the_network_is_warmed_up_inside_the_lock_before_the_worker_is_ready(service, monkeypatch, caplog):
    events = []
    handler = DamoYoloHandler()

    class StubDetector:
        config = ServingConfig(class_names=("cell",), warmup_batch_sizes=(1, 3))
        pipeline = SimpleNamespace(name="openvino", precision="bf16")

        def read_work(self):
            pass

        def warm_up(self, batch_sizes):
            events.append(("warm up", batch_sizes, "ready" if handler.initialized else "not ready"))

    def load(*_):
        events.append("load")
        return StubDetector()

    @contextlib.contextmanager
    def lock(device):
        events.append(("lock", device))
        yield
        events.append("unlock")

    monkeypatch.setattr("damoyolo.opening.describe_model", lambda *_: {})
    monkeypatch.setattr("damoyolo.opening.exclusive_device_lock", lock)
    monkeypatch.setattr("damoyolo.opening.Detector.from_settings", load)
    monkeypatch.setattr("damoyolo.opening.torch.set_num_threads", lambda _: None)
    handler.initialize(service.context)
    handler.service._drawing_pool.shutdown()
    cpu = torch.device("cpu")
    assert events == [("lock", cpu), "load", ("warm up", (1, 3), "not ready"), "unlock"]
    assert handler.initialized
    assert "the network runs in openvino, bf16, on cpu" in caplog.text


def test_the_threads_are_set_before_a_backend_takes_its_number_from_them(service, model_dir, monkeypatch):
    threads = torch.get_num_threads()
    seen = []

    class StopHereError(Exception):
        pass

    def from_settings(*_):
        seen.append(torch.get_num_threads())
        raise StopHereError

    monkeypatch.setattr("damoyolo.opening.Detector.from_settings", from_settings)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    settings = service.context.model_yaml_config
    try:
        for workers, most, compute_threads in ((1, 1, 0), (4, 4, 0), (1, 4, 0), (100, 100, 0), (4, 4, 5)):
            handler = {**settings["handler"], "compute_threads": compute_threads}
            monkeypatch.setattr(
                service.context,
                "model_yaml_config",
                {**settings, "minWorkers": workers, "maxWorkers": most, "handler": handler},
            )
            with pytest.raises(StopHereError):
                DamoYoloHandler().initialize(service.context)
    finally:
        torch.set_num_threads(threads)
    assert seen == [12, 3, 3, 1, 5]


@pytest.mark.parametrize(
    ("settings", "handler_settings", "expected"),
    [
        ({"responseTimeout": 30}, {}, 10.0),
        ({}, {}, 40.0),
        ({"responseTimeout": 10**6}, {}, 86_400.0),
        ({"responseTimeout": 30}, {"max_batch_seconds": 25}, 25.0),
        ({"responseTimeout": 30}, {"max_batch_seconds": 0}, 0.0),
    ],
)
def test_a_batch_may_begin_work_in_a_third_of_the_servers_time_or_as_the_archive_says(
    service, monkeypatch, settings, handler_settings, expected
):
    seen = []

    class StopHereError(Exception):
        pass

    def from_settings(found, *_):
        seen.append(ServingConfig.from_mapping(found).max_batch_seconds)
        raise StopHereError

    monkeypatch.setattr("damoyolo.opening.Detector.from_settings", from_settings)
    monkeypatch.setattr("damoyolo.opening.torch.set_num_threads", lambda _: None)
    handler = {**service.context.model_yaml_config["handler"], **handler_settings}
    monkeypatch.setattr(service.context, "model_yaml_config", {**settings, "handler": handler})
    with pytest.raises(StopHereError):
        DamoYoloHandler().initialize(service.context)
    assert seen == [pytest.approx(expected)]


def wire_request(name, body, headers=None):
    """A request as the worker's protocol hands it over."""
    return {
        "requestId": name.encode(),
        "parameters": [{"name": "body", "value": bytearray(body), "contentType": None}],
        "headers": [
            {"name": key.encode(), "value": value.encode()} for key, value in (headers or {}).items()
        ],
    }


def read_answers(message):
    """(request id, status, body, headers) of each item of an encoded batch response."""
    position = 0

    def number():
        nonlocal position
        (value,) = struct.unpack_from("!i", message, position)
        position += 4
        return int(value)

    def data():
        nonlocal position
        length = number()
        position += max(length, 0)
        return bytes(message[position - max(length, 0) : position])

    assert number() == 200
    data()
    answers = []
    while (length := number()) != -1:
        request_id = message[position : position + length].decode()
        position += length
        data()  # content type
        status = number()
        reason = data().decode("ascii")
        assert reason == ("OK" if status == 200 else reason)
        assert reason
        headers = {data().decode(): data().decode() for _ in range(number())}
        answers.append((request_id, status, data(), headers))
    return answers


def test_a_batch_of_good_and_bad_requests_goes_over_the_wire(service, project_dir):
    image = (project_dir / "tests/data/smears/smear_3.jpg").read_bytes()
    message = service.predict(
        [
            wire_request("a", image),
            wire_request("b", b"broken"),
            wire_request("c", image, {"Accept": "image/jpeg"}),
            wire_request("d", image, {"x-DETECT-classes": "WBC", "X-Detect-Max-Detections": "1"}),
            wire_request("e", b""),
        ]
    )
    answers = {answer[0]: answer for answer in read_answers(message)}
    assert list(answers) == ["a", "b", "c", "d", "e"]
    assert [answer[1] for answer in answers.values()] == [200, 415, 200, 200, 400]
    assert len(json.loads(answers["a"][2])["detections"]) == 21
    assert json.loads(answers["b"][2])["code"] == 415
    assert answers["c"][2][:2] == b"\xff\xd8"
    assert answers["c"][3]["content-type"] == "image/jpeg"
    assert [found["label"] for found in json.loads(answers["d"][2])["detections"]] == ["WBC"]


def test_every_status_line_and_content_type_is_plain_ascii():
    import damoyolo.errors as errors
    from damoyolo.response import CONTENT_TYPES

    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    request_errors = [each for each in kinds if issubclass(each, errors.RequestError)]
    assert len(request_errors) > 5
    for each in request_errors:
        assert each.reason.isascii()
        assert each.reason.isprintable()
        assert 400 <= each.status < 600
    assert all(content_type.isascii() for content_type in CONTENT_TYPES.values())


def test_a_batch_is_counted_with_its_stages_images_and_errors(service, project_dir, monkeypatch):
    image = (project_dir / "tests/data/smears/smear_3.jpg").read_bytes()
    totals = service.handler.metrics.totals
    monkeypatch.setattr(totals, "_interval_s", 3600.0)
    totals.flush()
    sent = {}
    monkeypatch.setattr(totals, "_send", lambda name, labels, value: sent.update({(name, labels): value}))
    service.predict([wire_request("a", image), wire_request("b", b"broken")])
    totals.flush()
    # As registered, whatever the archive was built as.
    model = ("cells", "unknown")
    assert sent["damoyolo_requests_total", model] == 2
    assert sent["damoyolo_images_total", (*model, "cpu")] == 1
    assert sent["damoyolo_detections_total", model] == 21
    assert sent["damoyolo_request_errors_total", (*model, "UnsupportedImage", "415")] == 1
    assert sent["damoyolo_batch_size_sum", model] == 2
    stages = {labels[2] for name, labels in sent if name == "damoyolo_stage_duration_seconds_count"}
    assert stages == {"parse", "preprocess", "network", "postprocess", "respond"}


def test_every_metric_is_declared_to_the_server_and_a_histogram_as_three_counters(project_dir):
    declared = yaml.safe_load((project_dir / "deploy/metrics.yaml").read_text())["model_metrics"]
    found = {
        kind: {metric["name"]: (metric["unit"], tuple(metric["dimensions"])) for metric in metrics}
        for kind, metrics in declared.items()
    }
    counters = {name: (metric.unit, metric.labels) for name, metric in COUNTERS.items()}
    for name, metric in HISTOGRAMS.items():
        counters[f"{name}_sum"] = (metric.unit, metric.labels)
        counters[f"{name}_count"] = ("Count", metric.labels)
        counters[f"{name}_bucket"] = ("Count", (*metric.labels, "le"))
    gauges = {name: (metric.unit, metric.labels) for name, metric in GAUGES.items()}
    assert found == {"counter": counters, "gauge": gauges}


def test_the_start_of_a_worker_is_one_line_per_series(service, caplog):
    caplog.set_level("INFO", "ts.metrics.caching_metric")
    service.handler.metrics.report_start()
    lines = [message for message in caplog.messages if message.startswith("[METRICS]")]
    assert len(lines) == len(set(lines)) > len(COUNTERS) + len(HISTOGRAMS)
    # As TorchServe's front end reads them (org.pytorch.serve.metrics.Metric).
    pattern = r"\[METRICS\]([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)\|#type:(\w+)\|#hostname:[^,]+,\d+"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert not [line for line in lines if "le:inf" in line]


def test_a_server_with_its_own_metrics_file_gets_no_lines(service, monkeypatch, caplog):
    caplog.set_level("INFO", "ts.metrics.caching_metric")
    monkeypatch.setattr(service.handler, "server_metrics", _stock_metrics())
    service.handler.metrics.report_start()
    assert "[METRICS]" not in caplog.text


def test_torchserve_s_time_of_a_batch_is_printed_only_where_the_server_knows_it(service, caplog):
    caplog.set_level("INFO", "ts.metrics.caching_metric")
    stock = _stock_metrics()
    _leave_out_undeclared_times(stock)
    stock.add_time("PredictionTime", 1.0)
    assert "PredictionTime" in caplog.text
    caplog.clear()
    service.predict([wire_request("a", b"")])
    assert "PredictionTime" not in caplog.text


@pytest.mark.parametrize("metrics", [None, "stock"])
def test_metrics_that_the_server_lacks_fail_no_request(service, project_dir, monkeypatch, metrics):
    image = (project_dir / "tests/data/smears/smear_3.jpg").read_bytes()
    monkeypatch.setattr(service.handler, "server_metrics", _stock_metrics() if metrics else None)
    ((_, status, _, _),) = read_answers(service.predict([wire_request("a", image)]))
    service.handler.metrics.totals.flush()
    assert status == 200


def _stock_metrics():
    """The metrics of a server without this project's file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # TorchServe leaves closing the file to Python
        metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs/metrics.yaml"))
    metrics.initialize_cache()
    return metrics


class ProcessEnded(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def lost_device(monkeypatch):
    """A device that no longer computes; ending the process raises `ProcessEnded`."""

    def end(code):
        assert code == 1
        raise ProcessEnded

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    monkeypatch.setattr("damoyolo.failures.is_alive", lambda _: False)


def fail(*_, **__):
    raise RuntimeError("CUDA error: unspecified launch failure")


# Object and method of the handler, and the statuses of a good and a bad request if only that method fails.
PLACES = [
    ("service", "_answer", [500, 500]),
    ("service.detector", "detect", [500, 500]),
    ("service.detector.preprocessor", "prepare", [500, 500]),
    ("service.detector.pipeline", "start", [500, 415]),
    ("service", "_respond_to_all", [500, 500]),
    ("clock", "_mark", [500, 500]),
    ("clock", "read_seconds", [200, 415]),
    ("metrics", "count_batch", [200, 415]),
]


@pytest.mark.parametrize(("owner", "name", "_statuses"), PLACES)
def test_a_lost_device_ends_the_worker_wherever_it_surfaces(
    service, lost_device, smear, monkeypatch, owner, name, _statuses
):
    monkeypatch.setattr(operator.attrgetter(owner)(service.handler), name, fail)
    with pytest.raises(ProcessEnded):
        service.predict([wire_request("a", smear)])


@pytest.mark.parametrize(("owner", "name", "statuses"), PLACES)
def test_the_same_failure_of_a_living_device_leaves_the_worker_serving(
    service, smear, monkeypatch, owner, name, statuses
):
    with monkeypatch.context() as patch:
        patch.setattr(operator.attrgetter(owner)(service.handler), name, fail)
        answers = read_answers(service.predict([wire_request("a", smear), wire_request("b", b"broken")]))
    assert [status for _, status, _, _ in answers] == statuses
    assert all(b"launch failure" not in body for _, _, body, _ in answers)
    ((_, status, _, _),) = read_answers(service.predict([wire_request("a", smear)]))
    assert status == 200


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_outside_of_detection_is_507(service, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(service.handler.service, "_respond_to_all", fail)
    answers = read_answers(service.predict([wire_request("a", b"x"), wire_request("b", b"y")]))
    assert [status for _, status, _, _ in answers] == [507, 507]


def test_the_entry_file_defines_exactly_one_class(project_dir):
    # TorchServe refuses a handler module with more.
    import ast

    tree = ast.parse((project_dir / "handler/damoyolo_handler.py").read_text())
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["DamoYoloHandler"]
