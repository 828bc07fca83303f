"""Bound and clean what a worker logs while it serves.

TorchServe reads a worker's standard output line by line: a line that begins with "[METRICS]" counts as a
metric, all others go to its log. So no text of a client may begin a line, a flood of bad requests must not
fill the disk, and a client's data stay out of the log.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import traceback
from collections.abc import Iterator

from damoyolo.errors import ConfigError, DeviceLostError

METRICS_LOGGER = "ts.metrics.caching_metric"

_MAX_RECORDS = 10
_INTERVAL_S = 60.0
_MAX_LINE = 300  # characters
_MAX_FRAMES = 12
_MAX_CHAINED = 4
# Other exceptions may quote what they were given, which may be a client's data.
_WITH_TEXT = (RuntimeError, MemoryError, ConfigError, DeviceLostError)

logger = logging.getLogger(__name__)


def protect_log() -> None:
    """Bound and clean all that the process logs from now on; Python's warnings are logged too."""
    logging.captureWarnings(True)
    limit = RecordLimit(_MAX_RECORDS, _INTERVAL_S)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # TorchServe's, and not those of a test run
            handler.setFormatter(LineFormatter())
            handler.addFilter(limit)


class RecordLimit(logging.Filter):
    """Lets a number of records of an interval pass, and says at its end how many others there were.

    Metrics and critical records always pass.
    """

    def __init__(self, max_records: int, interval_s: float) -> None:
        super().__init__()
        self._max_records = max_records
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._began_at = float("-inf")
        self._records = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record passes."""
        if record.name == METRICS_LOGGER or record.levelno >= logging.CRITICAL:
            return True
        with self._lock:
            now = time.monotonic()
            if now - self._began_at >= self._interval_s and self._records <= self._max_records:
                self._began_at, self._records = now, 0
            self._records += 1
            if self._records == self._max_records + 1:
                self._report_later(self._began_at + self._interval_s - now)
            return self._records <= self._max_records

    def _report_later(self, delay_s: float) -> None:
        timer = threading.Timer(max(0.0, delay_s), self._report)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:  # no further thread can be started
            self._records = 0

    def _report(self) -> None:
        with self._lock:
            suppressed = self._records - self._max_records
            self._began_at, self._records = time.monotonic(), 0
        logger.warning("left out %d messages of the last %.0f s", suppressed, self._interval_s)


class LineFormatter(logging.Formatter):
    """One line of printable ASCII per message; for errors, indented lines with the exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The text of the record; that of a metric is not changed."""
        message = record.getMessage()
        if record.name == METRICS_LOGGER:
            return message
        lines = [f"{record.levelname} {message}"]
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and record.levelno < logging.ERROR:
            lines[0] += f" ({type(error).__name__})"
        elif error is not None:
            lines += _exception_lines(error)
        return "\n    ".join(map(_printable, lines))


def _printable(line: str) -> str:
    cut = line if len(line) <= _MAX_LINE else line[: _MAX_LINE - 3] + "..."
    return re.sub(r"[^ -~]", lambda found: ascii(found[0])[1:-1], cut)


def _exception_lines(error: BaseException) -> Iterator[str]:
    """What led to the error, then the error, each with its innermost frames."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < _MAX_CHAINED:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    for each in reversed(chain):
        for frame in traceback.extract_tb(each.__traceback__)[-_MAX_FRAMES:]:
            yield f"{frame.filename}:{frame.lineno} in {frame.name}"
        yield type(each).__name__ + (f": {each}" if isinstance(each, _WITH_TEXT) else " (text withheld)")
