"""Signals that end a command which serves: raised as an exception, or handled as it says."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from types import FrameType


class StopSignal(Exception):  # noqa: N818 (a request, not an error)
    """The command has to end; the message is the signal's name."""


def raise_stop(number: int, _frame: FrameType | None) -> None:
    """The handler that raises StopSignal."""
    raise StopSignal(signal.Signals(number).name)


def on_stop_signals(
    action: Callable[[int, FrameType | None], object], numbers: Iterable[signal.Signals]
) -> None:
    """Handle these signals by `action` from now on."""
    for number in numbers:
        # `nohup` has it ignored, so that the end of the terminal is not that of the server.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, action)
