"""A detector's archive in LitServe: requests become rows of `DetectionService`, its answers responses."""

# Annotations stay objects here (no `from __future__ import annotations`): LitServe and FastAPI call them.
import asyncio
import json
import logging
import os
import threading
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import litserve
from fastapi import Depends, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

LAST_ANSWERS_S = 1.0  # in which the answers of a worker that ends reach the clients


@dataclass
class Row:
    """A request as the service reads it: fields and headers."""

    fields: dict[str, bytes]
    headers: dict[str, Any]


async def read_row(request: Request) -> Row:
    """The body, or the fields of a form; options of the query string count as headers."""
    headers: dict[str, Any] = dict(request.headers)
    options = {"x-detect-" + name.replace("_", "-"): value for name, value in request.query_params.items()}
    if not headers.get("content-type", "").startswith("multipart/form-data"):
        return Row({"body": await request.body()}, headers | options)
    fields = {}
    async with request.form() as form:
        for name, value in form.items():
            fields[name] = value.encode() if isinstance(value, str) else await value.read()
            if not isinstance(value, str):
                headers[name] = {"content-type": value.content_type}
    return Row(fields, headers | options)


class DetectionAPI(litserve.LitAPI):
    """Serves an unpacked archive; every request of a batch succeeds or fails on its own.

    model_dir: the unpacked archive, whose modules come first on the search path.
    settings: the content of its model-config.yaml; batch size, delay in ms and the queue's length are taken
        from it. workers: of all devices. api_servers: processes that share the queue's length.
    """

    def __init__(self, model_dir: Path, settings: dict[str, Any], workers: int, api_servers: int) -> None:
        super().__init__(max_batch_size=settings["batchSize"], batch_timeout=settings["maxBatchDelay"] / 1000)
        self.model_dir = model_dir
        self.settings = settings
        self.workers = workers
        self.most_waiting = max(1, settings["jobQueueSize"] // api_servers)

    def setup(self, device: str) -> None:
        """Load the network; runs in a worker, which imports PyTorch and the detector only here."""
        logging.getLogger().setLevel(logging.WARNING)
        import torch

        from damoyolo.opening import open_service
        from damoyolo.worker_log import protect_log

        self.service = open_service(
            self.model_dir, torch.device(device), workers=self.workers, settings=self.settings
        )
        protect_log()

    def decode_request(self, request: Annotated[Row, Depends(read_row)]) -> Row:
        """The annotation is what matters: FastAPI reads the request by it before LitServe queues it."""
        return request

    def predict(self, rows: list[Row] | Row) -> list[Any] | Any:
        """One answer for each row. LitServe gives no list if the batch size is 1."""
        return self.answer(rows) if isinstance(rows, list) else self.answer([rows])[0]

    def answer(self, rows: list[Row]) -> list[Any]:
        """The service's answers. A response of its own stands for each if the device is lost."""
        from damoyolo.errors import DeviceLostError

        try:
            return self.service.answer([row.fields for row in rows], [row.headers for row in rows])
        except DeviceLostError:
            # Every later CUDA call of this process would fail too. LitServe starts another worker, but never
            # answers the requests of one that has ended: these are answered first.
            logger.critical("the device is lost; ending this worker", exc_info=True)
            threading.Timer(LAST_ANSWERS_S, os._exit, (1,)).start()
            return [error_response(500, "the worker has lost its device; it is started again")] * len(rows)

    def encode_response(self, answer: Any) -> Response:
        """The answer's body, status and headers."""
        if isinstance(answer, Response):
            return answer
        headers = {"content-type": answer.content_type, **answer.headers}
        return Response(answer.body, answer.error.status if answer.error else 200, headers)


def error_response(status: int, message: str) -> Response:
    """An error of the server itself, in the form of the detector's errors."""
    kind = HTTPStatus(status).phrase.title().replace(" ", "")
    body = json.dumps({"code": status, "type": kind, "message": message}, separators=(",", ":"))
    return Response(body, status, media_type="application/json")


class Limits:
    """What LitServe leaves open: how many requests may wait, and for how long a client waits for an answer.

    LitServe's queue has no bound, and a request whose worker was killed would never be answered.
    """

    def __init__(self, app: ASGIApp, most_waiting: int, seconds: float) -> None:
        self.app = app
        self.waiting = 0
        self.most_waiting = most_waiting
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif self.waiting >= self.most_waiting:
            message = f"{self.most_waiting} requests are waiting, the most that are accepted (jobQueueSize)"
            await error_response(503, message)(scope, receive, send)
        else:
            self.waiting += 1
            try:
                await asyncio.wait_for(self.app(scope, receive, send), self.seconds)
            except asyncio.TimeoutError:
                message = f"no answer within {self.seconds:g} s"
                await error_response(504, message)(scope, receive, send)
            finally:
                self.waiting -= 1


def make_server(
    api: DetectionAPI, max_request_bytes: int, timeout_s: float, **where: Any
) -> litserve.LitServer:
    """The server of the API. where: LitServe's `accelerator`, `devices` and `workers_per_device`."""
    server = litserve.LitServer(
        api,
        timeout=timeout_s,
        max_payload_size=max_request_bytes,
        fast_queue=True,
        restart_workers=True,
        disable_openapi_url=True,  # it would not know the body
        **where,
    )
    # Twice: once in the queue, which LitServe limits by `timeout`, and once in a batch.
    server.app.add_middleware(Limits, most_waiting=api.most_waiting, seconds=2 * timeout_s)

    async def answer_error(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return error_response(error.status_code, str(error.detail))
        return error_response(500, "the server failed; its log has the cause")

    for status in (404, 405, 413, 500, 504):
        server.app.add_exception_handler(status, answer_error)
    return server
