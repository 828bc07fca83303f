"""Bound how long a batch begins further work, so that the server does not end its worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from damoyolo.errors import BatchTimeError

# Of the server's time for a batch. What has been begun is finished in the rest of that time: images of as
# many pixels as fit max_decode_bytes, and one call of the network. docs/limits.md has measured times; the
# margin is for slower machines and other work beside it.
SHARE_OF_RESPONSE_TIMEOUT = 1 / 3


class TimeBudget:
    """Seconds of a batch in which work may be begun. For one batch at a time, which may use several threads.

    limit_s: 0 for no limit. clock: seconds that only increase.
    """

    def __init__(self, limit_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._end_s: float | None = None

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Count the time inside of the `with` statement; outside there is no limit."""
        self._end_s = self._clock() + self.limit_s if self.limit_s else None
        try:
            yield
        finally:
            self._end_s = None

    def is_spent(self) -> bool:
        """Whether nothing more may be begun. Once true, it stays so until the batch ends."""
        return self._end_s is not None and self._clock() >= self._end_s

    def check(self) -> None:
        """Call before each piece of work.

        Raises:
            BatchTimeError: the time is spent.
        """
        if self.is_spent():
            raise self.refusal()

    def refusal(self) -> BatchTimeError:
        """The error of work that is not begun."""
        return BatchTimeError(
            f"the requests that were processed together took longer than {self.limit_s:g} s, so this one was "
            "not begun; send it again, or with fewer or smaller images (setting max_batch_seconds of the "
            "archive; by default a third of its responseTimeout)"
        )
