"""One process of the load generator: many keep-alive connections on one event loop, nothing in between.

`generator` runs it as a program of its own, which imports neither torch nor what its caller imports. The
requests are built beforehand; of an answer only the status line and two headers are read. That leaves about
30 us of work a request of 50 KB, nearly all of it the kernel's.
"""

from __future__ import annotations

import gc
import pickle
import random
import re
import select
import selectors
import socket
import sys
import time
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

TICK_S = 0.01  # how exactly time limits are kept
REST_S = 0.05  # pause of a connection that failed: a dead server is not asked in a tight loop
RECEIVE_BYTES = 65536
SEND_BUFFER_BYTES = 262144  # a whole camera image leaves in one call
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)")


@dataclass(frozen=True)
class WorkerTask:
    """The share of one process.

    requests: head and body of each, ready to send. first_request: where its first connection starts in them.
    rate_per_s: of an open loop, arrivals drawn from `seed` as a Poisson process or evenly spaced; None keeps
        each of the `connections` busy (closed loop).
    first_arrival_s: of an open loop with even spacing, so that the processes do not send in step.
    """

    host: str
    port: int
    requests: tuple[bytes, ...]
    connections: int
    first_request: int
    rate_per_s: float | None
    poisson: bool
    first_arrival_s: float
    warm_up_s: float
    duration_s: float
    timeout_s: float
    seed: int


@dataclass
class WorkerStats:
    """What became of the requests whose scheduled time lies in the window of measurement.

    latencies_s: of answers with status 200, from the scheduled time, and of requests that were given up.
    answers_in_window: answers of status 200 that arrived in the window, whenever they were sent.
    connection_errors: by name of the error. timeouts: sent, and no whole answer in time.
    dropped: of an open loop, no connection became free in time.
    answer_bytes: bodies of the answers of status 200 together.
    busy_share: CPU time over time of this process; near 1 it is the bottleneck.
    """

    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    answers_in_window: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    connection_errors: Counter[str] = field(default_factory=Counter)
    timeouts: int = 0
    dropped: int = 0
    answer_bytes: int = 0
    busy_share: float = 0.0


class _Connection:
    """A client: its socket, and the request that it waits for (`busy`)."""

    __slots__ = (
        "answer_bytes",
        "busy",
        "closes",
        "next_request",
        "outgoing",
        "received",
        "rests_until_s",
        "scheduled_s",
        "sent",
        "socket",
        "status",
        "waits_to_write",
    )

    def __init__(self, next_request: int) -> None:
        self.next_request = next_request
        self.socket: socket.socket | None = None
        self.waits_to_write = False
        self.busy = False
        self.rests_until_s: float | None = None
        self.scheduled_s = 0.0
        self.outgoing = memoryview(b"")
        self.sent = 0
        self.received = bytearray()
        self.status = 0
        self.answer_bytes = -1  # head and body; -1 until the head is known
        self.closes = False


class LoadLoop:
    """Carries out a task from `start_s` of the monotonic clock on; `run` returns when all is answered."""

    def __init__(self, task: WorkerTask, start_s: float) -> None:
        self._task = task
        self._window_s = (start_s + task.warm_up_s, start_s + task.warm_up_s + task.duration_s)
        self._next_arrival_s = start_s + task.first_arrival_s
        self._random = random.Random(task.seed)
        self._backlog: deque[float] = deque()  # scheduled times that wait for a connection
        count = len(task.requests)
        self._connections = [
            _Connection((task.first_request + index) % count) for index in range(task.connections)
        ]
        self._idle = deque(self._connections)
        self._busy_count = 0
        self._selector = selectors.DefaultSelector()
        family, _, _, _, address = socket.getaddrinfo(task.host, task.port, type=socket.SOCK_STREAM)[0]
        self._family: socket.AddressFamily = family
        self._address: tuple[Any, ...] = address
        self._tally = WorkerStats()

    def run(self) -> WorkerStats:
        """The tally; no later than the end of the window plus the time limit of a request."""
        next_scan_s = 0.0
        measured_from: tuple[float, float] | None = None
        measured_to: tuple[float, float] | None = None
        try:
            while True:
                now = time.monotonic()
                if measured_from is None and now >= self._window_s[0]:
                    measured_from = (now, time.process_time())
                if measured_to is None and now >= self._window_s[1]:
                    measured_to = (now, time.process_time())
                self._issue(now)
                if now >= next_scan_s:
                    self._scan(now)
                    next_scan_s = now + TICK_S
                if now >= self._window_s[1] and not self._busy_count and not self._backlog:
                    break
                self._poll(now)
        finally:
            for connection in self._connections:
                self._close(connection)
            self._selector.close()
        assert measured_from is not None
        assert measured_to is not None
        self._tally.busy_share = (measured_to[1] - measured_from[1]) / (measured_to[0] - measured_from[0])
        return self._tally

    def _issue(self, now: float) -> None:
        """Send what is due on connections that are free."""
        task, idle, backlog = self._task, self._idle, self._backlog
        if task.rate_per_s is None:
            if now < self._window_s[1]:
                while idle:
                    self._start(idle.popleft(), time.monotonic())
            return
        while self._next_arrival_s <= now and self._next_arrival_s < self._window_s[1]:
            backlog.append(self._next_arrival_s)
            self._next_arrival_s += (
                self._random.expovariate(task.rate_per_s) if task.poisson else 1 / task.rate_per_s
            )
        while backlog and now - backlog[0] > task.timeout_s:
            scheduled_s = backlog.popleft()
            if self._is_counted(scheduled_s):
                self._tally.dropped += 1
                self._tally.latencies_s.append(now - scheduled_s)
        while backlog and idle:
            self._start(idle.popleft(), backlog.popleft())

    def _poll(self, now: float) -> None:
        """Wait for the sockets, the next arrival or the next tick, and handle what the sockets have."""
        wait_s = TICK_S
        if self._task.rate_per_s is not None and self._next_arrival_s < self._window_s[1]:
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
        """Give up what is over its time limit; wake connections that rested."""
        for connection in self._connections:
            if connection.busy and now - connection.scheduled_s > self._task.timeout_s:
                if self._is_counted(connection.scheduled_s):
                    self._tally.timeouts += 1
                    self._tally.latencies_s.append(now - connection.scheduled_s)
                self._close(connection)
                self._release(connection)
            elif connection.rests_until_s is not None and now >= connection.rests_until_s:
                connection.rests_until_s = None
                self._idle.append(connection)

    def _start(self, connection: _Connection, scheduled_s: float) -> None:
        connection.busy = True
        self._busy_count += 1
        connection.scheduled_s = scheduled_s
        connection.outgoing = memoryview(self._task.requests[connection.next_request])
        connection.next_request = (connection.next_request + 1) % len(self._task.requests)
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
        connection.socket.connect_ex(self._address)  # what goes wrong is told again when sending
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
            # The server ended the connection, or speaks unasked.
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
            connection.answer_bytes = head_end + 4 + int(length[1])
            if len(received) >= connection.answer_bytes:
                self._complete(connection, int(length[1]))
        elif len(received) >= connection.answer_bytes:
            self._complete(connection, connection.answer_bytes - received.find(b"\r\n\r\n") - 4)

    def _complete(self, connection: _Connection, body_bytes: int) -> None:
        now = time.monotonic()
        tally = self._tally
        if connection.status == 200 and self._window_s[0] <= now < self._window_s[1]:
            tally.answers_in_window += 1
        if self._is_counted(connection.scheduled_s):
            tally.statuses[connection.status] += 1
            if connection.status == 200:
                tally.latencies_s.append(now - connection.scheduled_s)
                tally.answer_bytes += body_bytes
        if connection.closes or connection.sent < len(connection.outgoing):
            self._close(connection)
        self._release(connection)

    def _fail(self, connection: _Connection, reason: str) -> None:
        self._close(connection)
        if connection.busy:
            if self._is_counted(connection.scheduled_s):
                self._tally.connection_errors[reason] += 1
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
        return self._window_s[0] <= scheduled_s < self._window_s[1]


def work() -> None:
    """Talk with the parent over the standard streams: task in, ready out, start time in, tally out."""
    task: WorkerTask = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(b"R")
    sys.stdout.buffer.flush()
    start_s: float = pickle.load(sys.stdin.buffer)
    gc.disable()  # nothing here forms cycles, and a collection would show as latency
    pickle.dump(LoadLoop(task, start_s).run(), sys.stdout.buffer)
    sys.stdout.buffer.flush()
