"""Send one process's share of a load: many keep-alive connections on one event loop.

`generator` runs it as a program of its own, which imports the standard library alone. The requests are built
beforehand; of an answer only the status line and two headers are read. That leaves about 30 us of work per
request of 50 KB, nearly all of it the kernel's.
"""

from __future__ import annotations

import gc
import pickle
import random
import re
import select
import selectors
import signal
import socket
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TICK_S = 0.01  # precision of time limits
REST_S = 0.05  # pause of a connection that failed, so that a dead server is not called in a tight loop
RECEIVE_BYTES = 65536
SEND_BUFFER_BYTES = 262144  # a whole camera image leaves in one call
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)")


@dataclass(frozen=True)
class Load:
    """What to send, and how.

    bodies: encoded images; each connection cycles through them, starting at one of its own.
    connections: requests in flight; in an open loop their maximum.
    rate_per_s: arrivals of an open loop; None is a closed loop. poisson: random arrivals, else evenly spaced.
    warm_up_s: load before the measurement, not counted. timeout_s: of each request, from its arrival.
    processes: 0 takes a quarter of the cores, at most 4.
    headers: of each request, beside Host and Content-Length.
    """

    url: str
    bodies: Sequence[bytes]
    connections: int
    rate_per_s: float | None = None
    poisson: bool = True
    warm_up_s: float = 2.0
    duration_s: float = 10.0
    timeout_s: float = 30.0
    processes: int = 0
    seed: int = 0
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/octet-stream"),)

    def requests(self) -> tuple[bytes, ...]:
        """Head and body of a POST of each body."""
        parts = urlsplit(self.url)
        head = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers) + "Content-Length: "
        return tuple(f"{head}{len(body)}\r\n\r\n".encode("ascii") + body for body in self.bodies)


@dataclass(frozen=True)
class WorkerTask:
    """The share of one process.

    load: with the connections, the rate and the seed of this process.
    first_request: where its first connection starts in the bodies.
    first_arrival_s: of an open loop, differs between processes so that they do not send in step.
    """

    load: Load
    first_request: int
    first_arrival_s: float


@dataclass
class WorkerStats:
    """Counts and latencies of the requests whose scheduled time lies in the measured window.

    latencies_s: of answers with status 200, from the scheduled time, and of requests that were given up.
    answers_in_window: answers of status 200 that arrived in the window, whenever they were sent.
    connection_errors: by name of the error. timeouts: sent, and no complete answer in time.
    dropped: of an open loop, no connection became free in time.
    answer_bytes: total size of the bodies with status 200.
    busy_share: CPU time over wall time of this process; near 1 it is the bottleneck.
    """

    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    answers_in_window: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    connection_errors: Counter[str] = field(default_factory=Counter)
    timeouts: int = 0
    dropped: int = 0
    answer_bytes: int = 0
    busy_share: float = 0.0


@dataclass(slots=True, eq=False)
class _Connection:
    """A client: its socket, and the request whose answer it awaits (`busy`)."""

    next_request: int
    socket: socket.socket | None = None
    waits_to_write: bool = False
    busy: bool = False
    rests_until_s: float | None = None
    scheduled_s: float = 0.0
    outgoing: memoryview | bytes = b""
    sent: int = 0
    received: bytearray = field(default_factory=bytearray)
    status: int = 0
    body_bytes: int = 0
    answer_bytes: int = -1  # head and body; -1 until the head is known
    closes: bool = False


class LoadLoop:
    """Carries out a task from `start_s` of the monotonic clock on; `run` returns when all is answered."""

    def __init__(self, task: WorkerTask, start_s: float) -> None:
        self._load = load = task.load
        self._requests = load.requests()
        self._start_s = start_s + load.warm_up_s  # of the measured window
        self._end_s = self._start_s + load.duration_s
        self._next_arrival_s = start_s + task.first_arrival_s
        self._random = random.Random(load.seed)
        self._backlog: deque[float] = deque()  # scheduled times that wait for a connection
        self._connections = [
            _Connection((task.first_request + index) % len(self._requests))
            for index in range(load.connections)
        ]
        self._idle = deque(self._connections)
        self._busy_count = 0
        self._selector = selectors.DefaultSelector()
        parts = urlsplit(load.url)
        family, _, _, _, address = socket.getaddrinfo(
            parts.hostname, parts.port or 80, type=socket.SOCK_STREAM
        )[0]
        self._family: socket.AddressFamily = family
        self._address: tuple[Any, ...] = address
        self._stats = WorkerStats()

    def run(self) -> WorkerStats:
        """The statistics, no later than the end of the window plus the time limit of a request."""
        next_scan_s = 0.0
        clocks: list[tuple[float, float]] = []  # wall and CPU time at the start and the end of the window
        try:
            while True:
                now = time.monotonic()
                if len(clocks) < 2 and now >= (self._start_s, self._end_s)[len(clocks)]:
                    clocks.append((now, time.process_time()))
                self._issue(now)
                if now >= next_scan_s:
                    self._scan(now)
                    next_scan_s = now + TICK_S
                if len(clocks) == 2 and not self._busy_count and not self._backlog:
                    break
                self._poll(now)
        finally:
            for connection in self._connections:
                self._close(connection)
            self._selector.close()
        (start_s, start_cpu_s), (end_s, end_cpu_s) = clocks
        self._stats.busy_share = (end_cpu_s - start_cpu_s) / (end_s - start_s)
        return self._stats

    def _issue(self, now: float) -> None:
        """Send what is due on connections that are free."""
        load, idle, backlog = self._load, self._idle, self._backlog
        if load.rate_per_s is None:
            if now < self._end_s:
                while idle:
                    self._start(idle.popleft(), time.monotonic())
            return
        while self._next_arrival_s <= now and self._next_arrival_s < self._end_s:
            backlog.append(self._next_arrival_s)
            self._next_arrival_s += (
                self._random.expovariate(load.rate_per_s) if load.poisson else 1 / load.rate_per_s
            )
        while backlog and now - backlog[0] > load.timeout_s:
            scheduled_s = backlog.popleft()
            if self._is_counted(scheduled_s):
                self._stats.dropped += 1
                self._stats.latencies_s.append(now - scheduled_s)
        while backlog and idle:
            self._start(idle.popleft(), backlog.popleft())

    def _poll(self, now: float) -> None:
        """Wait for the sockets, the next arrival or the next tick; then send and receive."""
        wait_s = TICK_S
        if self._load.rate_per_s is not None and self._next_arrival_s < self._end_s:
            wait_s = min(max(self._next_arrival_s - now, 0.0), TICK_S)
            # epoll waits for whole milliseconds, which would delay arrivals; select knows microseconds.
            select.select([self._selector], [], [], wait_s)
            wait_s = 0.0
        for key, events in self._selector.select(wait_s):
            connection: _Connection = key.data
            if events & selectors.EVENT_WRITE and connection.busy:
                self._send(connection)
            if events & selectors.EVENT_READ and connection.socket is not None:
                self._receive(connection)

    def _scan(self, now: float) -> None:
        """Give up requests that are over their time limit; reuse connections that have rested."""
        for connection in self._connections:
            if connection.busy and now - connection.scheduled_s > self._load.timeout_s:
                if self._is_counted(connection.scheduled_s):
                    self._stats.timeouts += 1
                    self._stats.latencies_s.append(now - connection.scheduled_s)
                self._close(connection)
                self._release(connection)
            elif connection.rests_until_s is not None and now >= connection.rests_until_s:
                connection.rests_until_s = None
                self._idle.append(connection)

    def _start(self, connection: _Connection, scheduled_s: float) -> None:
        connection.busy = True
        self._busy_count += 1
        connection.scheduled_s = scheduled_s
        connection.outgoing = memoryview(self._requests[connection.next_request])
        connection.next_request = (connection.next_request + 1) % len(self._requests)
        connection.sent = 0
        connection.received.clear()
        connection.answer_bytes = -1
        if connection.socket is None:
            self._open(connection)  # sends as soon as it is connected
        else:
            self._send(connection)

    def _open(self, connection: _Connection) -> None:
        connection.socket = socket.socket(self._family, socket.SOCK_STREAM)
        connection.socket.setblocking(False)
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        connection.socket.connect_ex(self._address)  # a failure shows when sending
        connection.waits_to_write = True
        self._selector.register(
            connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, data=connection
        )

    def _send(self, connection: _Connection) -> None:
        assert connection.socket is not None
        try:
            connection.sent += connection.socket.send(connection.outgoing[connection.sent :])
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(connection, type(error).__name__)
            return
        waits_to_write = connection.sent < len(connection.outgoing)
        if waits_to_write != connection.waits_to_write:
            connection.waits_to_write = waits_to_write
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if waits_to_write else 0)
            self._selector.modify(connection.socket, events, data=connection)

    def _receive(self, connection: _Connection) -> None:
        assert connection.socket is not None
        try:
            chunk = connection.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(connection, type(error).__name__)
            return
        if not chunk or not connection.busy:
            # The server ended the connection, or sends without a request.
            self._fail(connection, "ConnectionClosed")
            return
        received = connection.received
        received += chunk
        if connection.answer_bytes < 0:
            head_end = received.find(b"\r\n\r\n")
            if head_end < 0:
                return
            head = bytes(received[:head_end]).lower()
            length = CONTENT_LENGTH.search(head)
            if not head.startswith(b"http/1.") or not head[9:12].isdigit() or length is None:
                self._fail(connection, "UnreadableAnswer")
                return
            connection.status = int(head[9:12])
            connection.closes = b"\r\nconnection: close" in head
            connection.body_bytes = int(length[1])
            connection.answer_bytes = head_end + 4 + connection.body_bytes
        if len(received) >= connection.answer_bytes:
            self._complete(connection)

    def _complete(self, connection: _Connection) -> None:
        now = time.monotonic()
        if connection.status == 200 and self._start_s <= now < self._end_s:
            self._stats.answers_in_window += 1
        if self._is_counted(connection.scheduled_s):
            self._stats.statuses[connection.status] += 1
            if connection.status == 200:
                self._stats.latencies_s.append(now - connection.scheduled_s)
                self._stats.answer_bytes += connection.body_bytes
        if connection.closes or connection.sent < len(connection.outgoing):
            self._close(connection)
        self._release(connection)

    def _fail(self, connection: _Connection, reason: str) -> None:
        self._close(connection)
        if connection.busy:
            if self._is_counted(connection.scheduled_s):
                self._stats.connection_errors[reason] += 1
            connection.busy = False
            self._busy_count -= 1
            connection.rests_until_s = time.monotonic() + REST_S

    def _release(self, connection: _Connection) -> None:
        connection.busy = False
        self._busy_count -= 1
        self._idle.append(connection)

    def _close(self, connection: _Connection) -> None:
        if connection.socket is not None:
            self._selector.unregister(connection.socket)
            connection.socket.close()
            connection.socket = None

    def _is_counted(self, scheduled_s: float) -> bool:
        return self._start_s <= scheduled_s < self._end_s


def work() -> None:
    """Serve the parent over the standard streams: task in, ready out, start time in, statistics out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    task: WorkerTask = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(b"R")
    sys.stdout.buffer.flush()
    start_s: float = pickle.load(sys.stdin.buffer)
    gc.disable()  # nothing here forms cycles, and a collection would show as latency
    pickle.dump(LoadLoop(task, start_s).run(), sys.stdout.buffer)
    sys.stdout.buffer.flush()
