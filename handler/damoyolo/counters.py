"""Sum counters and send them at intervals."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

CounterKey = tuple[str, tuple[str, ...]]  # name of the counter, values of its dimensions
# Name of the counter, values of its dimensions, increment.
SendCounter = Callable[[str, tuple[str, ...], float], None]


class CounterTotals:
    """Sums increments and sends each counter at most once in `interval_s` seconds.

    Sending a metric costs the worker a line of output (about 30 us); once per batch, that would be several
    per cent of the time of a fast GPU. A timer sends the rest when no further batch comes.
    """

    def __init__(self, send: SendCounter, interval_s: float) -> None:
        self._send = send
        self._interval_s = interval_s
        self._totals: dict[CounterKey, float] = {}
        self._lock = threading.Lock()
        self._sent_at = float("-inf")
        self._timer: threading.Timer | None = None

    def add(self, increments: dict[CounterKey, float]) -> None:
        """Add to the counters, each named by (name, values of its dimensions)."""
        with self._lock:
            for key, value in increments.items():
                self._totals[key] = self._totals.get(key, 0.0) + value
            due_in_s = self._sent_at + self._interval_s - time.monotonic()
            if due_in_s > 0 and self._timer is None:
                self._timer = threading.Timer(due_in_s, self.flush)
                self._timer.daemon = True
                self._timer.start()
        if due_in_s <= 0:
            self.flush()

    def flush(self) -> None:
        """Send what was added since the last time."""
        with self._lock:
            totals, self._totals = self._totals, {}
            self._sent_at = time.monotonic()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        for (name, dimensions), value in totals.items():
            self._send(name, dimensions, value)
