"""The reason of a worker's failure in the server's log."""

import pytest

from lib.deploy.worker_log import LogReader

LINE = "2026-01-01T00:00:00,000 [INFO ] W-9001-{}-stdout MODEL_LOG {}\n"


def lines(version, *messages):
    return "".join(LINE.format(version, message) for message in messages)


@pytest.mark.parametrize(
    "first", ["Failed to load model m, exception no weights", "Backend worker process died."]
)
def test_the_traceback_of_the_version_is_found_up_to_the_next_process(tmp_path, first):
    path = tmp_path / "torchserve.log"
    path.write_text(lines("m_2.0", "Backend worker process died.", "an earlier fault"))
    reader = LogReader(path)
    assert reader.failure("m", "2.0") == ""
    with path.open("a") as file:
        file.write(lines("m_1.0", "Backend worker process died.", "another version's"))
        file.write("2026-01-01T00:00:00,000 [WARN ] main Other Failed to load model m\n")
        file.write(lines("m_2.0", "[PID]1", first, "Traceback:", "OSError: no weights"))
        file.write(lines("m_2.0", "s_name_part0=/tmp/x, s_name_part1=9001, pid=2", "not of the first"))
    assert reader.failure("m", "2.0").split("\n") == [
        first,
        "Traceback:",
        "OSError: no weights",
    ]


def test_a_long_traceback_is_cut_to_its_end(tmp_path):
    path = tmp_path / "torchserve.log"
    reader = LogReader(path)
    path.write_text(lines("m_2.0", "Backend worker process died.", *map(str, range(100))))
    found = reader.failure("m", "2.0").split("\n")
    assert (found[0], found[-1], len(found)) == ("Backend worker process died.", "99", 16)


def test_a_log_that_is_absent_or_was_rotated_is_read_from_its_beginning(tmp_path):
    path = tmp_path / "torchserve.log"
    assert LogReader(path).failure("m", "2.0") == ""
    path.write_text("x" * 10_000)
    reader = LogReader(path)
    path.write_text(lines("m_2.0", "Backend worker process died."))
    assert reader.failure("m", "2.0") == "Backend worker process died."
