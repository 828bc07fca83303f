"""Stand-ins for the detection server: they answer as a test tells them to, and record the requests."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass
class Reply:
    """What the server sends back; with `drop` the body alone, no head, and a closed connection."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


def found(*detections: Mapping[str, Any], width: int = 640, height: int = 480) -> Reply:
    """The reply of an image with these detections."""
    answer = {"width": width, "height": height, "detections": list(detections)}
    return Reply(body=json.dumps(answer).encode(), headers={"Content-Type": "application/json"})


def failed(status: int, kind: str, message: str) -> Reply:
    """An error reply in the server's form."""
    return Reply(status, json.dumps({"code": status, "type": kind, "message": message}).encode())


class StandInServer:
    """Serves on a port of 127.0.0.1, 0 for a free one, while entered; each request has a thread for `answer`.

    At the end it drops its connections.
    """

    def __init__(self, answer: Callable[[Asked], Reply], port: int = 0) -> None:
        self.asked: list[Asked] = []
        self.connections: set[Any] = set()
        self.most_at_once = 0
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        lock, under_way = threading.Lock(), 0
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms between head and body

            def setup(self) -> None:
                super().setup()
                stand_in._sockets.add(self.connection)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked = Asked(self.command, self.path, dict(self.headers), body)
                nonlocal under_way
                with lock:
                    stand_in.asked.append(asked)
                    stand_in.connections.add(self.client_address)
                    under_way += 1
                    stand_in.most_at_once = max(stand_in.most_at_once, under_way)
                try:
                    reply = answer(asked)
                finally:
                    with lock:
                        under_way -= 1
                if reply.drop:
                    self.wfile.write(reply.body)
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                if reply.status >= 400:  # as TorchServe does
                    self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(reply.body)

            do_GET = do_PUT = do_POST  # noqa: N815 (names of the base class)

            def log_message(self, format: str, *args: Any) -> None:
                """Keep quiet."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that gave up is no error of the test."""

        self._server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/predictions/damoyolo"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> StandInServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()


METRICS_PAGE = """# HELP batches_total Torchserve prometheus counter metric with unit: Count
# TYPE batches_total counter
batches_total{{ModelName="m",Level="Model",Hostname="h",}} {batches}
batched_requests_total{{ModelName="m",Level="Model",Hostname="h",}} {requests}
batched_requests_total{{ModelName="other",Level="Model",Hostname="h",}} 7.0
stage_seconds_total{{ModelName="m",Level="Model",Stage="network",Hostname="h",}} {network_s}
ts_inference_requests_total{{model_name="m",model_version="default",hostname="h",}} 1.5E3
"""


class StandInModel(StandInServer):
    """A model "m" with management and metrics: answers after 10 ms, counts batches of four and 5 ms."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.base_url = self.url.removesuffix("/predictions/damoyolo")
        self.workers = 1
        self.worker_status = "READY"

    def _answer(self, asked: Asked) -> Reply:
        if asked.method == "POST":
            time.sleep(0.01)
            return Reply(body=b'{"detections":[]}')
        if asked.method == "PUT":
            self.workers = int(asked.path.rpartition("=")[2])
            return Reply(body=b"{}")
        if asked.path == "/metrics":
            requests = sum(each.method == "POST" for each in self.asked)
            batches = requests / 4
            page = METRICS_PAGE.format(batches=batches, requests=requests, network_s=batches * 0.005)
            return Reply(body=page.encode())
        workers = [{"status": self.worker_status}] * self.workers
        return Reply(body=json.dumps([{"batchSize": 4, "maxBatchDelay": 2, "workers": workers}]).encode())
