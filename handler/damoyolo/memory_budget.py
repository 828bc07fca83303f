"""Bound the memory of work that runs at the same time in several threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class MemoryBudget:
    """Bytes that threads share: who needs more than is left waits; who needs more than all runs alone.

    A thread must not reserve a second time while it holds a reservation.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Wait until the bytes are free, and hold them inside of the `with` statement."""
        granted = min(size_bytes, self.total_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._used_bytes + granted <= self.total_bytes)
            self._used_bytes += granted
        try:
            yield
        finally:
            with self._changed:
                self._used_bytes -= granted
                self._changed.notify_all()

    def groups(self, sizes_bytes: Iterable[tuple[int, int]]) -> list[list[int]]:
        """Split (key, bytes) into lists of keys, in order, each of which fits or is a single key."""
        groups: list[list[int]] = []
        room = -1
        for key, size_bytes in sizes_bytes:
            if not groups or size_bytes > room:
                groups.append([])
                room = self.total_bytes
            groups[-1].append(key)
            room -= size_bytes
        return groups
