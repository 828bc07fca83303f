"""Stand-ins for the detection server: they answer as a test tells them to, and record the requests."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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


def found(*detections, width=640, height=480):
    """The reply of an image with these detections."""
    answer = {"width": width, "height": height, "detections": list(detections)}
    return Reply(body=json.dumps(answer).encode(), headers={"Content-Type": "application/json"})


def failed(status, kind, message):
    """An error reply in the server's form."""
    return Reply(status, json.dumps({"code": status, "type": kind, "message": message}).encode())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms between head and body

    def setup(self):
        super().setup()
        self.server.open_sockets.add(self.connection)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self.server.reply_to(
            Asked(self.command, self.path, dict(self.headers), body), self.client_address
        )
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

    do_GET = do_PUT = do_DELETE = do_POST  # noqa: N815 (names of the base class)

    def log_message(self, format, *args):
        """Keep quiet."""


class StandInServer(ThreadingHTTPServer):
    """Serves on a port of 127.0.0.1, 0 for a free one, while entered; each request has a thread for `answer`.

    At the end it drops its connections.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, answer, port=0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.base_url = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.base_url}/predictions/damoyolo"
        self.asked = []
        self.connections = set()
        self.open_sockets = weakref.WeakSet()
        self.most_at_once = 0
        self._answer, self._lock, self._under_way = answer, threading.Lock(), 0
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def reply_to(self, asked, client):
        """Record a request and answer it."""
        with self._lock:
            self.asked.append(asked)
            self.connections.add(client)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            return self._answer(asked)
        finally:
            with self._lock:
                self._under_way -= 1

    def handle_error(self, request, client_address):
        """A client that gave up is no error of the test."""

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()
        for connection in list(self.open_sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()


METRICS_PAGE = """# HELP damoyolo_batch_size Requests of a batch.
# TYPE damoyolo_batch_size histogram
damoyolo_batch_size_sum{{model_name="m",model_version="1.0",}} {requests}
damoyolo_batch_size_count{{model_name="m",model_version="1.0",}} {batches}
damoyolo_batch_size_bucket{{model_name="m",model_version="1.0",le="+Inf",}} {batches}
damoyolo_batch_size_sum{{model_name="other",model_version="1.0",}} 7.0
# HELP damoyolo_stage_duration_seconds Time of a stage for a whole batch.
# TYPE damoyolo_stage_duration_seconds histogram
damoyolo_stage_duration_seconds_sum{{model_name="m",model_version="1.0",stage="network",}} {network_s}
ts_inference_requests_total{{model_name="m",model_version="default",hostname="h",}} 1.5E3
"""


class StandInModel(StandInServer):
    """A model "m" with management and metrics: answers after 10 ms, counts batches of four and 5 ms."""

    def __init__(self):
        super().__init__(self._model_answer)
        self.workers = 1
        self.worker_status = "READY"

    def _model_answer(self, asked):
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
