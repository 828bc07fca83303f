import fcntl
import io
import os

import pytest

from lib.server.dropping_output import MISSING_LINES, DroppingOutput


def closed_file():
    file = io.StringIO()
    file.close()
    return file


@pytest.fixture
def pipe():
    """The reading descriptor and the writing file of a pipe that holds 4096 bytes."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with open(reading, "rb", buffering=0) as reader, open(writing, "w") as writer:
        yield reader, writer


def test_lines_reach_the_stream_in_their_order(tmp_path):
    with (tmp_path / "file").open("w", encoding="latin-1") as file:
        output = DroppingOutput(file)
        for line in ("first", "\N{CHECK MARK} second", "a surrogate \udcff"):
            output.print(line)
        output.flush()
    lines = (tmp_path / "file").read_text(encoding="utf-8").splitlines()
    assert lines == ["first", "\N{CHECK MARK} second", "a surrogate \\udcff"]


@pytest.mark.parametrize("stream", [None, io.StringIO(), closed_file()])
def test_without_a_descriptor_nothing_is_written(stream):
    output = DroppingOutput(stream)
    output.print("line")
    output.flush()


def test_a_stream_that_refuses_costs_its_lines_alone():
    with open("/dev/full", "w") as full:
        output = DroppingOutput(full)
        for _ in range(3):
            output.print("line")
        output.flush(60.0)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_full_pipe_holds_nobody_and_gets_lines_again_when_it_is_read(pipe, blocking):
    reader, writer = pipe
    os.set_blocking(writer.fileno(), blocking)
    output = DroppingOutput(writer, queued_lines=10)
    for number in range(1000):  # more than pipe and queue hold
        output.print(f"line {number} {'.' * 100}")
    received = b""
    while MISSING_LINES not in received:
        output.print("later")
        received += reader.read(4096)
    assert b"line 999 " not in received
