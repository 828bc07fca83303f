"""Sum counters and histograms and send what was added at intervals.

Counting never fails a request: whatever goes wrong here is logged once, and the metrics stay behind.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

logger = logging.getLogger(__name__)

MetricKey = tuple[str, tuple[str, ...]]  # name of the metric, values of its labels
# Name of the metric, values of its labels, increment (of a gauge: its value).
SendMetric = Callable[[str, tuple[str, ...], float], None]


class Histogram:
    """Observations since the last time they were taken, by bucket.

    bounds: upper bounds of the buckets, ascending and inclusive; another bucket without a bound follows.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._is_new = True

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value that occurred so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def take(self) -> list[tuple[str, tuple[str, ...], float]]:
        """Increments of the three counters that make a histogram in Prometheus: suffix, label le, increment.

        The first time all of them, so that the series begin at 0; later those that are not 0.
        """
        below = list(accumulate(self._counts))
        rows: list[tuple[str, tuple[str, ...], float]] = [
            ("_sum", (), self._sum),
            ("_count", (), below[-1]),
        ]
        for bound, count in zip((*self._bounds, math.inf), below, strict=True):
            rows.append(("_bucket", ("+Inf" if bound == math.inf else str(float(bound)),), count))
        taken = [row for row in rows if self._is_new or row[2]]
        self._counts = [0] * len(self._counts)
        self._sum = 0.0
        self._is_new = False
        return taken


class MetricTotals:
    """Sums increments and observations, and sends each metric at most once in `interval_s` seconds.

    Sending a metric costs the worker a line of output (about 30 us); once per batch, that would be several
    per cent of the time of a fast GPU. A timer sends, so that no batch waits for it.

    buckets: upper bounds of the buckets of each histogram, by name.
    gauges: called before each sending; present values of gauges.
    """

    def __init__(
        self,
        send: SendMetric,
        interval_s: float,
        buckets: Mapping[str, Sequence[float]],
        gauges: Callable[[], Mapping[MetricKey, float]] = dict,
    ) -> None:
        self._send = send
        self._interval_s = interval_s
        self._buckets = buckets
        self._gauges = gauges
        self._counters: dict[MetricKey, float] = {}
        self._histograms: dict[MetricKey, Histogram] = {}
        self._lock = threading.Lock()
        self._sent_at = float("-inf")
        self._timer: threading.Timer | None = None
        self._failure_logged = False

    def add(
        self,
        increments: Mapping[MetricKey, float],
        observations: Sequence[tuple[MetricKey, float, int]] = (),
    ) -> None:
        """Add to counters, and to histograms values that occurred so many times. Never raises."""
        try:
            self._add(increments, observations)
        except Exception as error:  # for example, no thread can be started
            self._log_first_failure(error)

    def _add(
        self, increments: Mapping[MetricKey, float], observations: Sequence[tuple[MetricKey, float, int]]
    ) -> None:
        with self._lock:
            for key, value in increments.items():
                self._counters[key] = self._counters.get(key, 0.0) + value
            for key, value, times in observations:
                if key not in self._histograms:
                    self._histograms[key] = Histogram(self._buckets[key[0]])
                self._histograms[key].observe(value, times)
            if self._timer is None:
                due_in_s = max(0.0, self._sent_at + self._interval_s - time.monotonic())
                timer = threading.Timer(due_in_s, self.flush)
                timer.daemon = True
                timer.start()
                self._timer = timer

    def flush(self) -> None:
        """Send what was added since the last time. What cannot be sent is dropped."""
        rows = self._present_gauges()
        with self._lock:
            rows += [(name, labels, value) for (name, labels), value in self._counters.items()]
            self._counters = {}
            for (name, labels), histogram in self._histograms.items():
                rows += [(name + suffix, labels + le, value) for suffix, le, value in histogram.take()]
            self._sent_at = time.monotonic()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        for row in rows:
            try:
                self._send(*row)
            except Exception as error:
                self._log_first_failure(error)

    def _present_gauges(self) -> list[tuple[str, tuple[str, ...], float]]:
        try:
            return [(name, labels, value) for (name, labels), value in self._gauges().items()]
        except Exception as error:
            self._log_first_failure(error)
            return []

    def _log_first_failure(self, error: Exception) -> None:
        if not self._failure_logged:
            self._failure_logged = True
            logger.error("metrics are incomplete from now on", exc_info=error)
