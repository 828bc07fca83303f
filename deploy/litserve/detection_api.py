"""A detector's archive in LitServe: requests become rows of `DetectionService`, its answers responses."""

# Annotations stay objects here (no `from __future__ import annotations`): LitServe and FastAPI call them.
import asyncio
import json
import logging
import math
import os
import threading
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import anyio
import litserve
from fastapi import Depends, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
    settings: the content of its model-config.yaml; batch size, delay in ms, workers and the queue's length,
        both of all devices, are taken from it. api_servers: processes that share the queue's length.
    """

    def __init__(self, model_dir: Path, settings: dict[str, Any], api_servers: int) -> None:
        super().__init__(max_batch_size=settings["batchSize"], batch_timeout=settings["maxBatchDelay"] / 1000)
        self.model_dir = model_dir
        self.settings = settings
        self.workers = settings["minWorkers"]
        # What waits for an answer here is in TorchServe's queue or with one of its workers.
        open_requests = settings["jobQueueSize"] + settings["batchSize"] * self.workers
        self.most_waiting = math.ceil(open_requests / api_servers)

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

    LitServe's queue has no bound, and a request whose worker was killed would never be answered. A request
    waits from the end of its body to the start of its answer, so a slow client takes nobody's place.
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
            return
        if self.waiting >= self.most_waiting:  # before its body is read
            await self.refusal()(scope, receive, send)
            return
        waits = answered = False

        async def noted_receive() -> Message:
            nonlocal waits
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body") and not waits:
                if self.waiting >= self.most_waiting:
                    raise HTTPException(503, self.reason())
                waits = True
                self.waiting += 1
                limit.deadline = anyio.current_time() + self.seconds
            return message

        def leave() -> None:
            nonlocal waits
            self.waiting -= waits
            waits = False

        async def noted_send(message: Message) -> None:
            nonlocal answered
            answered = True
            limit.deadline = math.inf
            leave()
            await send(message)

        try:
            with anyio.CancelScope() as limit:
                await self.app(scope, noted_receive, noted_send)
        finally:
            leave()
        if limit.cancelled_caught and not answered:
            await error_response(504, f"no answer within {self.seconds:g} s")(scope, receive, send)

    def reason(self) -> str:
        """Why a request is refused."""
        return f"{self.most_waiting} requests wait for answers, the most that are accepted (jobQueueSize)"

    def refusal(self) -> Response:
        """The answer to a request that finds no place."""
        return error_response(503, self.reason())


class OpenAnswers(dict[str, Any]):
    """LitServe's answers that requests wait for. LitServe keeps one whose request was given up for ever."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self.pop(key, None))


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
    server.response_buffer = OpenAnswers()
    # Twice: once in the queue, which LitServe limits by `timeout`, and once in a batch.
    server.app.add_middleware(Limits, most_waiting=api.most_waiting, seconds=2 * timeout_s)

    async def answer_error(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return error_response(error.status_code, str(error.detail))
        return error_response(500, "the server failed; its log has the cause")

    for kind in (HTTPException, 500):
        server.app.add_exception_handler(kind, answer_error)
    return server
