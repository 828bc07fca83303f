"""Clients that send one image after another and never twice, while a test disturbs the server."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import requests

TIMEOUT_S = 120.0


class SteadyLoad:
    """Sends while entered; keeps the time and status of each answer.

    A request without an answer has the status of its error's name, and one with another body than `expected`,
    where that is given, "wrong answer". pause_s: of a client after each answer. session: attributes of
    the sessions.
    """

    def __init__(self, url, image, clients, pause_s=0.0, expected=None, **session):
        self.url = url
        self.image = image
        self.clients = clients
        self.pause_s, self.expected, self.session = pause_s, expected, session
        self._answers = []  # time and status
        self._waits = []  # time of the request and seconds until its answer
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
            for name, value in self.session.items():
                setattr(session, name, value)
            while not self._over.is_set():
                asked_s = time.monotonic()
                try:
                    answer = session.post(self.url, data=self.image, timeout=TIMEOUT_S)
                    status = answer.status_code
                    if status == 200 and self.expected not in (None, answer.content):
                        status = "wrong answer"
                except requests.RequestException as error:
                    status = type(error).__name__
                self._answers.append((time.monotonic(), status))
                self._waits.append((asked_s, time.monotonic() - asked_s))
                self._over.wait(self.pause_s)

    def mark(self):
        """The disturbance comes now."""
        self._marked_s = time.monotonic()

    def answered(self):
        return len(self._answers)

    def lost(self):
        """What came back in place of a result."""
        return [status for _, status in self._answers if status != 200]

    def waits_s(self, since_s, until_s):
        """How long each request that was sent or under way within this time waited."""
        return [wait for asked, wait in self._waits if asked <= until_s and asked + wait >= since_s]

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
