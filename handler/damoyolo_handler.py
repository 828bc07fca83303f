"""Serve DAMO-YOLO in TorchServe: rows in, one body and one status per row out."""

from __future__ import annotations

import contextlib
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

from damoyolo.errors import DeviceLostError
from damoyolo.inference_answer import ModelIdentity
from damoyolo.metrics import GAUGES, WorkerMetrics
from damoyolo.opening import open_service
from damoyolo.server_settings import read_max_response_size
from damoyolo.service import Answer
from damoyolo.stage_timing import StageClock
from damoyolo.worker_log import protect_log
from damoyolo.worker_protocol import read_messages_in_large_pieces

logger = logging.getLogger(__name__)


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
        manifest = context.manifest["model"]
        # As it was registered; the manifest has the name with which the archive was built.
        model = ModelIdentity(str(context.model_name), str(manifest.get("modelVersion", "")))
        self.service = open_service(
            Path(properties["model_dir"]),
            device,
            workers=_most_workers(context.model_yaml_config),
            settings=context.model_yaml_config,
            model=model,
            # A larger answer would end the worker. A server without this project's settings takes less.
            max_response_bytes=read_max_response_size(os.getppid()),
        )
        detector = self.service.detector
        backend = detector.pipeline
        logger.info("the network runs in %s, %s, on %s", backend.name, backend.precision, device)
        self.clock = StageClock(device)
        self.server_metrics = context.metrics
        _leave_out_undeclared_times(context.metrics)
        self.metrics = WorkerMetrics(self._send_metric, model, device)
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
        headers = [context.get_all_request_header(index) for index in range(len(data))]
        answers = self.service.answer(data, headers, self.clock)
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
