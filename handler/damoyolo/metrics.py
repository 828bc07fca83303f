"""Define the metrics of a worker, and count batches in them.

deploy/metrics.yaml declares them to the server: TorchServe knows a histogram as three counters, because its
own kind has fixed buckets and takes a line of output per observation. deploy/front-end puts the three
together. docs/monitoring.md describes each metric.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from damoyolo.counters import MetricKey, MetricTotals, SendMetric
from damoyolo.errors import RequestError
from damoyolo.stage_timing import NETWORK, PARSE, POSTPROCESS, PREPROCESS, RESPOND
from damoyolo.structures import Work

INTERVAL_S = 1.0
MODEL = ("model_name", "model_version")
# A line for the server separates labels by , : and |. WorkerMetrics.java puts the true name and version back.
_NOT_SENT = re.compile(r"[^A-Za-z0-9_.+-]")
_STAGE_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


@dataclass(frozen=True)
class Metric:
    """A metric as the server must know it.

    unit: a word of TorchServe's metrics file. buckets: upper bounds, of a histogram.
    """

    unit: str
    labels: tuple[str, ...] = MODEL
    buckets: tuple[float, ...] = ()


COUNTERS = {
    "damoyolo_requests_total": Metric("Count"),
    "damoyolo_request_errors_total": Metric("Count", (*MODEL, "reason", "code")),
    "damoyolo_images_total": Metric("Count", (*MODEL, "decoder")),
    "damoyolo_detections_total": Metric("Count"),
    "damoyolo_worker_starts_total": Metric("Count"),
}
HISTOGRAMS = {
    "damoyolo_batch_size": Metric("Count", buckets=(1, 2, 4, 8, 16, 32, 64, 128)),
    "damoyolo_worker_request_duration_seconds": Metric(
        "Seconds", buckets=(0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10)
    ),
    "damoyolo_stage_duration_seconds": Metric("Seconds", (*MODEL, "stage"), _STAGE_BUCKETS),
}
GAUGES = {
    "damoyolo_worker_start_time_seconds": Metric("Seconds", (*MODEL, "worker_id")),
    "damoyolo_worker_load_duration_seconds": Metric("Seconds", (*MODEL, "worker_id")),
    "damoyolo_worker_gpu_memory_bytes": Metric("Bytes", (*MODEL, "worker_id")),
    "damoyolo_gpu_memory_used_bytes": Metric("Bytes", ("device_id",)),
    "damoyolo_gpu_memory_capacity_bytes": Metric("Bytes", ("device_id",)),
}


class WorkerMetrics:
    """The metrics of one worker of a model.

    model: name, as it was registered, and version. send: takes one metric to the server.
    """

    def __init__(self, send: SendMetric, model: tuple[str, str], device: torch.device) -> None:
        self._model = tuple(_NOT_SENT.sub("_", text) or "unknown" for text in model)
        self._device = device
        self._worker_id = read_worker_id(sys.argv)
        buckets = {name: metric.buckets for name, metric in HISTOGRAMS.items()}
        self.totals = MetricTotals(send, INTERVAL_S, buckets, self._memory)

    def report_start(self) -> None:
        """Send when this worker was started, how long it loaded, and all series with 0.

        Prometheus computes growth from pairs of values: without the zeros it would miss the first error.
        """
        started_at = process_start_time()
        decoders = ("cpu", "gpu") if self._device.type == "cuda" else ("cpu",)
        first: dict[MetricKey, float] = {
            self._key("damoyolo_worker_start_time_seconds", self._worker_id): started_at,
            self._key("damoyolo_worker_load_duration_seconds", self._worker_id): time.time() - started_at,
            self._key("damoyolo_worker_starts_total"): 1.0,
            self._key("damoyolo_requests_total"): 0.0,
            self._key("damoyolo_detections_total"): 0.0,
        }
        first |= {self._key("damoyolo_images_total", decoder): 0.0 for decoder in decoders}
        first |= {
            self._key("damoyolo_request_errors_total", error.kind, str(error.status)): 0.0
            for error in _all_kinds(RequestError)
        }
        stages = (PARSE, PREPROCESS, NETWORK, POSTPROCESS, RESPOND)
        empty = [self._key("damoyolo_stage_duration_seconds", stage) for stage in stages]
        empty += [self._key("damoyolo_batch_size"), self._key("damoyolo_worker_request_duration_seconds")]
        self.totals.add(first, [(key, 0.0, 0) for key in empty])
        self.totals.flush()

    def count_batch(
        self,
        requests: int,
        errors: Iterable[RequestError],
        work: Work,
        seconds: float,
        stage_seconds: Mapping[str, float],
    ) -> None:
        """Count a batch that was answered.

        seconds: from the batch's arrival in the worker to its answers. stage_seconds: in each stage.
        """
        increments: dict[MetricKey, float] = {
            self._key("damoyolo_requests_total"): requests,
            self._key("damoyolo_images_total", "cpu"): work.cpu_images,
            self._key("damoyolo_detections_total"): work.detections,
        }
        if work.gpu_images:
            increments[self._key("damoyolo_images_total", "gpu")] = work.gpu_images
        for (kind, status), count in Counter((error.kind, error.status) for error in errors).items():
            increments[self._key("damoyolo_request_errors_total", kind, str(status))] = count
        observations = [
            (self._key("damoyolo_batch_size"), float(requests), 1),
            (self._key("damoyolo_worker_request_duration_seconds"), seconds, requests),
        ]
        observations += [
            (self._key("damoyolo_stage_duration_seconds", stage), value, 1)
            for stage, value in stage_seconds.items()
        ]
        self.totals.add(increments, observations)

    def _key(self, name: str, *labels: str) -> MetricKey:
        return name, (*self._model, *labels)

    def _memory(self) -> dict[MetricKey, float]:
        """Memory of the GPU: what PyTorch holds in this process, and that of the device as a whole."""
        if self._device.type != "cuda":
            return {}
        free, capacity = torch.cuda.mem_get_info(self._device)
        device = (str(self._device.index or 0),)
        return {
            self._key("damoyolo_worker_gpu_memory_bytes", self._worker_id): float(
                torch.cuda.memory_reserved(self._device)
            ),
            ("damoyolo_gpu_memory_used_bytes", device): float(capacity - free),
            ("damoyolo_gpu_memory_capacity_bytes", device): float(capacity),
        }


def read_worker_id(arguments: Sequence[str]) -> str:
    """The server's id of this worker, as in the management API; a new process in its place has the same.

    arguments: of the worker's process; its socket is named after the id.
    """
    for option in ("--sock-name", "--port"):
        if option in arguments[:-1]:
            return arguments[arguments.index(option) + 1].rpartition(".")[2]
    return "unknown"


def process_start_time() -> float:
    """Unix time at which this process was started."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot_s = int(fields[19]) / os.sysconf(
        "SC_CLK_TCK"
    )  # field 22, starttime; the first here is field 3
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s)


def _all_kinds(error: type[RequestError]) -> Iterator[type[RequestError]]:
    yield error
    for kind in error.__subclasses__():
        yield from _all_kinds(kind)
