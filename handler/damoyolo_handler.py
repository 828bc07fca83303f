"""Serve DAMO-YOLO in TorchServe: rows in, one body and one status per row out."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from damoyolo.backends import openvino_import  # noqa: F401  (must come before TorchServe's base handler)

# isort: split
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes
from ts.torch_handler.base_handler import BaseHandler

from damoyolo.config import MAX_BATCH_SECONDS, ServingConfig
from damoyolo.cores import usable_cores
from damoyolo.cuda.blocking_sync import enable_blocking_sync
from damoyolo.cuda.kernel_cache import use_compiled_kernels
from damoyolo.cuda.startup_lock import exclusive_device_lock
from damoyolo.detector import WEIGHTS_FILE, Detector
from damoyolo.errors import DeviceLostError
from damoyolo.failures import is_alive
from damoyolo.inference_answer import ModelIdentity
from damoyolo.metrics import GAUGES, WorkerMetrics
from damoyolo.model_card import describe_model
from damoyolo.server_settings import read_max_response_size
from damoyolo.service import Answer, DetectionService
from damoyolo.stage_timing import StageClock
from damoyolo.time_budget import SHARE_OF_RESPONSE_TIMEOUT
from damoyolo.worker_log import protect_log
from damoyolo.worker_protocol import read_messages_in_large_pieces

logger = logging.getLogger(__name__)

DEFAULT_RESPONSE_TIMEOUT_S = 120  # TorchServe's, for a model-config.yaml without one


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
        settings = dict(context.model_yaml_config.get("handler") or {})
        config = ServingConfig.from_mapping(settings)
        # A larger answer would end the worker. A server without this project's settings takes less.
        settings["max_response_bytes"] = min(config.max_response_bytes, read_max_response_size(os.getppid()))
        # Before the server ends a worker whose batch takes too long, which costs all requests of the batch.
        settings.setdefault("max_batch_seconds", _batch_seconds(context.model_yaml_config))
        _share_machine(device, config, _most_workers(context.model_yaml_config))
        model_dir = Path(properties["model_dir"])
        if device.type == "cuda":
            use_compiled_kernels(model_dir)
        with exclusive_device_lock(device):
            detector = Detector.from_settings(settings, model_dir / WEIGHTS_FILE, device)
            detector.warm_up(detector.config.warmup_batch_sizes)
            is_alive(device)
        backend = detector.pipeline
        logger.info("the network runs in %s, %s, on %s", backend.name, backend.precision, device)

        manifest = context.manifest["model"]
        version = str(manifest.get("modelVersion", ""))
        card = describe_model(detector, model_dir / WEIGHTS_FILE, version)
        # As it was registered; the manifest has the name with which the archive was built.
        name = str(context.model_name)
        self.service = DetectionService(
            detector, json.dumps(card).encode("ascii"), ModelIdentity(name, version)
        )
        self.clock = StageClock(device)
        self.server_metrics = context.metrics
        _leave_out_undeclared_times(context.metrics)
        self.metrics = WorkerMetrics(self._send_metric, (name, version), device)
        # JSON is then read in one place, by the rules of damoyolo.request, and broken JSON logs no traceback.
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        read_messages_in_large_pieces()
        protect_log()
        detector.read_work()  # the warm-up's
        self.metrics.report_start()
        self.initialized = True

    def handle(self, data: Sequence[Mapping[str, Any]], context: Any) -> list[bytes]:
        """The body of each row, in the order of the rows; status and content type go to the context.

        Nothing that a request or the device does raises here: TorchServe would give all rows the same error.
        """
        try:
            answers = self._answer(data, context)
        except DeviceLostError:
            # Every later CUDA call of this process would fail too, while the server considers the worker
            # healthy. If it ends, the server starts a new one.
            logger.critical("the device is lost; ending this worker", exc_info=True)
            logging.shutdown()
            os._exit(1)
        for index, answer in enumerate(answers):
            context.set_response_content_type(index, answer.content_type)
            for name, value in answer.headers.items():
                context.set_response_header(index, name, value)
            # The server's own phrase for 200 is empty, which some clients take for an error.
            code, phrase = (answer.error.status, answer.error.reason) if answer.error else (200, "OK")
            context.set_response_status(code=code, phrase=phrase, idx=index)
        return [answer.body for answer in answers]

    def _answer(self, data: Sequence[Mapping[str, Any]], context: Any) -> list[Answer]:
        """One answer per row, counted.

        Raises:
            DeviceLostError: wherever an error of the device surfaced, timing included.
        """
        began = time.perf_counter()
        try:
            headers = [context.get_all_request_header(index) for index in range(len(data))]
            answers = self.service.answer(data, headers, self.clock)
        except DeviceLostError:
            raise
        except Exception as error:
            answers = [self.service.answer_failure(error, "answering a batch")] * len(data)
        try:
            self._count(answers, time.perf_counter() - began)
        except Exception as error:
            self.service.answer_failure(error, "counting a batch")
        return answers

    def _count(self, answers: Sequence[Answer], seconds: float) -> None:
        self.metrics.count_batch(
            len(answers),
            [answer.error for answer in answers if answer.error],
            self.service.detector.read_work(),
            seconds,
            self.clock.read_seconds(),
        )

    def _send_metric(self, name: str, labels: tuple[str, ...], value: float) -> None:
        kind = MetricTypes.GAUGE if name in GAUGES else MetricTypes.COUNTER
        # A server whose metrics file does not declare it would drop the line, and by default log it.
        with contextlib.suppress(MetricsCacheKeyError):
            self.server_metrics.get_metric(name, kind).add_or_update(value, list(labels))


def _leave_out_undeclared_times(metrics: Any) -> None:
    """Spare the line that TorchServe prints per batch even where the server does not know the metric."""
    try:
        metrics.get_metric("PredictionTime", MetricTypes.GAUGE)
    except MetricsCacheKeyError:
        metrics.add_time = lambda *_, **__: None


def _most_workers(settings: Mapping[str, Any]) -> int:
    """The number of workers among which the machine is divided.

    As in the settings: how many run now would be wrong in a moment, when others start or end, and a backend
    keeps the number of threads for which it has compiled the network.
    """
    return max(1, *(int(settings.get(key) or 1) for key in ("minWorkers", "maxWorkers")))


def _batch_seconds(settings: Mapping[str, Any]) -> float:
    """The time in which a batch may begin work."""
    seconds = float(settings.get("responseTimeout") or DEFAULT_RESPONSE_TIMEOUT_S)
    return min(MAX_BATCH_SECONDS, SHARE_OF_RESPONSE_TIMEOUT * seconds)


def _share_machine(device: torch.device, config: ServingConfig, workers: int) -> None:
    """Take a worker's share of the cores. Call before the detector: backends take PyTorch's threads."""
    cores = usable_cores()
    if device.type == "cpu":
        # More threads than cores would slow all workers down.
        torch.set_num_threads(config.compute_threads or max(1, cores // workers))
        return
    if config.cuda_sync == "blocking" or (config.cuda_sync == "auto" and 2 * workers > cores):
        enable_blocking_sync(device)
    torch.cuda.set_device(device)
