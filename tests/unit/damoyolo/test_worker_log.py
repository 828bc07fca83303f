"""What a worker's log may hold, and how much of it."""

import io
import json
import logging
import time

import pytest

from damoyolo.errors import DeviceLostError
from damoyolo.worker_log import METRICS_LOGGER, LineFormatter, RecordLimit, protect_log

SECRET = "\xff\xd8 bytes of a body\n[METRICS]Fake.Count:1|#Level:Host"


@pytest.fixture
def worker_log():
    """A logger of its own, formatted and limited as in a worker, and what it wrote."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    return logger, stream


def lines_of(stream):
    return stream.getvalue().splitlines()


def test_a_message_is_one_line_of_ascii_that_is_no_metric(worker_log):
    logger, stream = worker_log
    logger.warning("%s", "[METRICS]Fake.Count:1|#Level:Host|#hostname:x,1\r\n[METRICS]\x1b[31m\u2028ß\x00")
    (line,) = lines_of(stream)
    assert line.isascii()
    assert line.isprintable()
    assert line.startswith("WARNING [METRICS]")


def test_a_long_message_is_cut(worker_log):
    logger, stream = worker_log
    logger.error("x" * 1_000_000)
    assert len(stream.getvalue()) <= 301


@pytest.mark.parametrize("error_type", [ValueError, KeyError, OSError, SyntaxError, AssertionError])
def test_the_text_of_an_error_that_may_quote_a_client_is_withheld(worker_log, error_type):
    logger, stream = worker_log
    try:
        raise error_type(SECRET)
    except error_type:
        logger.exception("unexpected")
    assert "bytes of a body" not in stream.getvalue()
    assert f"    {error_type.__name__} (text withheld)" in lines_of(stream)
    assert any("test_worker_log.py:" in line for line in lines_of(stream))


@pytest.mark.parametrize("error_type", [RuntimeError, MemoryError, DeviceLostError])
def test_the_text_of_an_error_of_the_device_is_kept_in_one_line(worker_log, error_type):
    logger, stream = worker_log
    try:
        raise error_type("CUDA error: launch failure\n[METRICS]Fake.Count:1")
    except error_type:
        logger.exception("unexpected")
    assert all(line.startswith(("ERROR", "    ")) for line in lines_of(stream))
    assert f"    {error_type.__name__}: CUDA error: launch failure" in stream.getvalue()


def test_causes_are_named_and_deep_tracebacks_are_cut(worker_log):
    def descend(depth):
        if depth:
            descend(depth - 1)
        json.loads("{" + SECRET)

    logger, stream = worker_log
    try:
        try:
            descend(100)
        except ValueError as error:
            raise RuntimeError("reading failed") from error
    except RuntimeError:
        logger.exception("unexpected")
    text = stream.getvalue()
    assert text.index("JSONDecodeError (text withheld)") < text.index("RuntimeError: reading failed")
    assert len(lines_of(stream)) < 30
    assert "bytes of a body" not in text


def test_a_warning_has_no_traceback(worker_log):
    logger, stream = worker_log
    try:
        json.loads(SECRET)
    except ValueError:
        # As TorchServe's protocol does for a body that is no JSON.
        logger.warning("Failed json decoding of input data.", exc_info=True)
    assert lines_of(stream) == ["WARNING Failed json decoding of input data. (JSONDecodeError)"]


def test_metrics_are_written_as_they_are(worker_log):
    logger, stream = worker_log
    logger.name = METRICS_LOGGER
    logger.info("[METRICS]batches_total.Count:1.0|#ModelName:größe")
    assert lines_of(stream) == ["[METRICS]batches_total.Count:1.0|#ModelName:größe"]


def test_a_flood_is_bounded_and_counted(worker_log):
    logger, stream = worker_log
    logger.handlers[0].addFilter(limit := RecordLimit(max_records=3, interval_s=0.5))
    reported = logging.getLogger("damoyolo.worker_log")
    reported.addHandler(logger.handlers[0])
    try:
        for _ in range(1000):
            logger.error("failed")
        assert len(lines_of(stream)) == 3
        deadline = time.monotonic() + 20
        while len(lines_of(stream)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        reported.removeHandler(logger.handlers[0])
    assert "left out 997 messages" in lines_of(stream)[3]
    logger.error("failed again")
    assert "failed again" in lines_of(stream)[4]
    assert limit._records == 2


def test_what_ends_the_worker_and_metrics_pass_every_flood():
    limit = RecordLimit(max_records=1, interval_s=3600)
    records = [
        logging.makeLogRecord({"name": name, "levelno": level})
        for name, level in (("x", logging.ERROR), ("x", logging.CRITICAL), (METRICS_LOGGER, logging.INFO))
    ]
    passed = [[limit.filter(record) for record in records] for _ in range(3)]
    assert passed == [[True, True, True], [False, True, True], [False, True, True]]


def test_a_machine_without_a_free_thread_still_logs(monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Timer.start", start)
    limit = RecordLimit(max_records=1, interval_s=3600)
    record = logging.makeLogRecord({"levelno": logging.ERROR})
    assert [limit.filter(record) for _ in range(3)]


def test_only_the_handlers_of_the_server_are_changed(monkeypatch):
    ours = logging.StreamHandler(io.StringIO())
    others = list(logging.getLogger().handlers)
    formatters = [handler.formatter for handler in others]
    logging.getLogger().addHandler(ours)
    try:
        protect_log()
    finally:
        logging.getLogger().removeHandler(ours)
        logging.captureWarnings(False)
    assert isinstance(ours.formatter, LineFormatter)
    assert [type(each) for each in ours.filters] == [RecordLimit]
    assert [handler.formatter for handler in others] == formatters
