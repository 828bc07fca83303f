"""When a request is sent again: which failures pass, how long to wait, and when to give up."""

from __future__ import annotations

import random
import threading
import time

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0
# A server or worker that ended with the image in hand may have ended because of it.
MAX_LOSSES = 6


class Outage:
    """How long a server has been answering nobody; shared by the requests of one client."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since_s: float | None = None
        self._last_s = 0.0

    def asked(self, memory_s: float) -> None:
        """A request begins; a server that was asked for nothing during `memory_s` may be back."""
        with self._lock:
            if time.monotonic() > self._last_s + memory_s:
                self._since_s = None

    def answered(self) -> None:
        """The server has dealt with a request."""
        with self._lock:
            self._since_s = None

    def failed(self) -> float:
        """A request has failed for now; the time since when they all do, on the clock of `time.monotonic`."""
        with self._lock:
            self._last_s = time.monotonic()
            if self._since_s is None:
                self._since_s = self._last_s
            return self._since_s


class Attempts:
    """The attempts to send one image.

    total_s: how long failures that pass are followed by another attempt. When the server has answered no
        request for that time, further images get one attempt each, until a pause longer than it.
    first_pause_s: base of the exponential back-off, up to MAX_PAUSE_S.
    cancelled: ends the waiting.
    """

    def __init__(
        self, total_s: float, outage: Outage, cancelled: threading.Event, first_pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self.made = 1
        self.lost = 0
        self.total_s = total_s
        self._outage = outage
        self._cancelled = cancelled
        self._pause_s = first_pause_s
        self._failed_s: float | None = None
        outage.asked(total_s)

    def wait_for_next(self, lost: bool) -> bool:
        """Wait before the next attempt; False if there is none.

        lost: whether the server had the image when the attempt failed.
        """
        now_s = time.monotonic()
        outage_s = self._outage.failed()
        if self._failed_s is None:
            self._failed_s = now_s
        self.lost += lost
        left_s = min(self._failed_s, outage_s) + self.total_s - now_s
        if left_s <= 0 or self.lost >= MAX_LOSSES or self._cancelled.is_set():
            return False
        # At random, so that the requests of many threads do not come back all at once.
        pause_s = min(self._pause_s * random.uniform(1, 2), MAX_PAUSE_S, left_s)
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        self.made += 1
        return not self._cancelled.wait(pause_s)
