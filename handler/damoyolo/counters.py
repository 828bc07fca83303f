"""Sum counters and send them at intervals.

Counting never fails a request: whatever goes wrong here is logged once, and the counters stay behind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

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
        self._failure_logged = False

    def add(self, increments: dict[CounterKey, float]) -> None:
        """Add to the counters, each named by (name, values of its dimensions). Never raises."""
        try:
            self._add(increments)
        except Exception as error:  # for example, no thread can be started
            self._log_first_failure(error)

    def _add(self, increments: dict[CounterKey, float]) -> None:
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
        """Send what was added since the last time. A counter that cannot be sent is dropped."""
        with self._lock:
            totals, self._totals = self._totals, {}
            self._sent_at = time.monotonic()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        for (name, dimensions), value in totals.items():
            try:
                self._send(name, dimensions, value)
            except Exception as error:
                self._log_first_failure(error)

    def _log_first_failure(self, error: Exception) -> None:
        if not self._failure_logged:
            self._failure_logged = True
            logger.error("counters are incomplete from now on", exc_info=error)
