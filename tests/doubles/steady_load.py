"""Clients that send one image after another and never twice, while a test disturbs the server."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import requests

TIMEOUT_S = 120.0


class SteadyLoad:
    """Sends while entered; keeps the time and status of each answer.

    A request without an answer has the status of its error's name.
    """

    def __init__(self, url, image, clients):
        self.url = url
        self.image = image
        self.clients = clients
        self._answers = []
        self._marked_s = 0.0
        self._over = threading.Event()

    def __enter__(self):
        self._pool = ThreadPoolExecutor(self.clients)
        self._futures = [self._pool.submit(self._send) for _ in range(self.clients)]
        return self

    def __exit__(self, *_):
        self._over.set()
        for future in self._futures:
            future.result()
        self._pool.shutdown()

    def _send(self):
        with requests.Session() as session:
            session.trust_env = False
            while not self._over.is_set():
                try:
                    answer = session.post(self.url, data=self.image, timeout=TIMEOUT_S)
                    status = answer.status_code
                except requests.RequestException as error:
                    status = type(error).__name__
                self._answers.append((time.monotonic(), status))

    def mark(self):
        """The disturbance comes now."""
        self._marked_s = time.monotonic()

    def answered(self):
        return len(self._answers)

    def lost(self):
        """What came back in place of a result."""
        return [status for _, status in self._answers if status != 200]

    def is_served_again(self):
        """Whether there has been a gap of half a second, and an answer for each client after it."""
        gap_s, end_s = self._gap()
        return gap_s > 0.5 and sum(at > end_s for at, status in self._answers if status == 200) > self.clients

    def _gap(self):
        """The longest time without a result after the mark, and its end, in seconds."""
        times = sorted(at for at, status in self._answers if status == 200)
        gaps = [(after - before, after) for before, after in pairwise(times) if after > self._marked_s]
        return max(gaps, default=(0.0, 0.0))

    def figures(self):
        return f"{self.answered()} requests, lost {self.lost()}, gap {self._gap()[0]:.1f} s"
