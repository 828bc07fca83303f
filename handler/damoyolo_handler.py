"""Serve DAMO-YOLO in TorchServe: rows in, one body and one status per row out."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from damoyolo.backends import openvino_import  # noqa: F401  (must come before TorchServe's base handler)

# isort: split
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes
from ts.torch_handler.base_handler import BaseHandler

from damoyolo.config import ServingConfig
from damoyolo.counters import CounterKey, CounterTotals
from damoyolo.cuda.blocking_sync import enable_blocking_sync
from damoyolo.cuda.kernel_cache import use_compiled_kernels
from damoyolo.cuda.startup_lock import exclusive_device_lock
from damoyolo.detector import WEIGHTS_FILE, Detector
from damoyolo.errors import DeviceLostError
from damoyolo.service import DetectionService
from damoyolo.stage_timing import StageClock

logger = logging.getLogger(__name__)

METRICS_INTERVAL_S = 1.0
# Counters of the handler: unit, and dimensions after those of every metric. deploy/metrics.yaml declares them
# to the server; a server without that file drops them unless model_metrics_auto_detect is set.
COUNTERS = {
    "batches_total": ("Count", ()),
    "batched_requests_total": ("Count", ()),
    "request_errors_total": ("Count", ("Kind",)),
    "stage_seconds_total": ("Seconds", ("Stage",)),
}


class DamoYoloHandler(BaseHandler):  # type: ignore[misc]
    """Serves a packaged DAMO-YOLO; every request of a batch succeeds or fails on its own.

    It has its own `handle`, because the inherited one decides for a whole batch by its first item.
    """

    def initialize(self, context: Any) -> None:
        """Load the network on the worker's device and warm it up before the worker reports ready.

        Raises:
            ConfigError, CheckpointError: settings and weights of the archive do not fit together.
        """
        # The server logs every line that a worker prints; metrics are sent the same way at level INFO.
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("ts.metrics.caching_metric").setLevel(logging.INFO)
        logger.setLevel(logging.INFO)

        properties = context.system_properties
        gpu_id = properties.get("gpu_id")
        device = torch.device("cpu" if gpu_id is None else f"cuda:{gpu_id}")
        settings = context.model_yaml_config.get("handler") or {}
        workers = max(1, int(context.model_yaml_config.get("minWorkers") or 1))
        _share_machine(device, ServingConfig.from_mapping(settings), workers)
        model_dir = Path(properties["model_dir"])
        if device.type == "cuda":
            use_compiled_kernels(model_dir)
        with exclusive_device_lock(device):
            detector = Detector.from_settings(settings, model_dir / WEIGHTS_FILE, device)
            detector.warm_up(detector.config.warmup_batch_sizes)
        backend = detector.pipeline
        logger.info("the network runs in %s, %s, on %s", backend.name, backend.precision, device)

        self.service = DetectionService(detector)
        self.clock = StageClock(device)
        self.model_name = str(context.manifest["model"]["modelName"])
        self.metrics = context.metrics
        self.counters = CounterTotals(self._send_counter, METRICS_INTERVAL_S)
        self.initialized = True

    def handle(self, data: Sequence[Mapping[str, Any]], context: Any) -> list[bytes]:
        """The body of each row, in the order of the rows; status and content type go to the context."""
        headers = [context.get_all_request_header(index) for index in range(len(data))]
        try:
            answers = self.service.answer(data, headers, self.clock)
        except DeviceLostError:
            # Every later CUDA call of this process would fail too, while the server considers the worker
            # healthy. If it ends, the server starts a new one.
            logger.exception("the device is lost; ending this worker")
            logging.shutdown()
            os._exit(1)
        errors: Counter[str] = Counter()
        for index, answer in enumerate(answers):
            context.set_response_content_type(index, answer.content_type)
            if answer.error is not None:
                context.set_response_status(code=answer.error.status, phrase=answer.error.reason, idx=index)
                errors[answer.error.kind] += 1
        self._count(len(data), errors)
        return [answer.body for answer in answers]

    def _count(self, requests: int, errors: Counter[str]) -> None:
        increments: dict[CounterKey, float] = {
            ("batches_total", ()): 1.0,
            ("batched_requests_total", ()): float(requests),
        }
        increments |= {("request_errors_total", (kind,)): float(count) for kind, count in errors.items()}
        increments |= {
            ("stage_seconds_total", (stage,)): seconds for stage, seconds in self.clock.read_seconds().items()
        }
        self.counters.add(increments)

    def _send_counter(self, name: str, dimensions: tuple[str, ...], value: float) -> None:
        try:
            metric = self.metrics.get_metric(name, MetricTypes.COUNTER)
        except MetricsCacheKeyError:  # the server's metrics file does not declare it
            unit, own_dimensions = COUNTERS[name]
            metric = self.metrics.add_metric_to_cache(
                name, unit, ["ModelName", "Level", *own_dimensions], MetricTypes.COUNTER
            )
        metric.add_or_update(value, [self.model_name, "Model", *dimensions])


def _share_machine(device: torch.device, config: ServingConfig, workers: int) -> None:
    """Take a worker's share of the cores. Call before the detector: backends take PyTorch's threads."""
    cores = len(os.sched_getaffinity(0))
    if device.type == "cpu":
        # More threads than cores would slow all workers down.
        torch.set_num_threads(config.compute_threads or max(1, cores // workers))
        return
    if config.cuda_sync == "blocking" or (config.cuda_sync == "auto" and 2 * workers > cores):
        enable_blocking_sync(device)
    torch.cuda.set_device(device)
