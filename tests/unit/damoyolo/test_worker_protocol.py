"""The reader of large pieces against TorchServe's own, byte by byte and in any pieces."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ts.protocol import otf_message_handler

from damoyolo.worker_protocol import MessageReader, read_messages_in_large_pieces


class Connection:
    """Delivers bytes in pieces of the given sizes, then one by one."""

    def __init__(self, message, sizes=()):
        self._rest = message
        self._sizes = list(sizes)
        self.calls = 0

    def recv(self, size):
        self.calls += 1
        size = min(size, self._sizes.pop(0) if self._sizes else size)
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def integer(value):
    return struct.pack("!i", value)


def text(value):
    return integer(len(value)) + value


def message_of(requests):
    """requests: (id, headers as pairs, parameters as name, content type, value)."""
    parts = []
    for request_id, headers, parameters in requests:
        parts.append(text(request_id))
        parts += [text(name) + text(value) for name, value in headers]
        parts.append(integer(-1))
        parts += [text(name) + text(kind) + text(value) for name, kind, value in parameters]
        parts.append(integer(-1))
    return b"".join([*parts, integer(-1)])


ascii_bytes = st.text("abc-/:09", max_size=6).map(str.encode)
requests = st.lists(
    st.tuples(
        ascii_bytes,
        st.lists(st.tuples(ascii_bytes, ascii_bytes), max_size=3),
        st.lists(st.tuples(ascii_bytes, ascii_bytes, st.binary(max_size=40)), max_size=3),
    ),
    max_size=4,
)


@given(requests, st.lists(st.integers(1, 50), max_size=20))
def test_it_reads_what_torchserve_reads_in_any_pieces(found, sizes):
    message = message_of(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TS_DECODE_INPUT_REQUEST", "false")
        expected = otf_message_handler._retrieve_inference_msg(Connection(message))
    assert MessageReader(Connection(message, sizes)).read_requests() == expected


def test_a_batch_that_has_arrived_takes_one_call():
    message = message_of([(b"id", [(b"Host", b"x")] * 5, [(b"body", b"image/jpeg", bytes(8000))])] * 64)
    connection = Connection(message)
    assert len(MessageReader(connection).read_requests()) == 64
    assert connection.calls == 1


def test_the_end_of_the_server_ends_the_worker():
    message = message_of([(b"id", [], [(b"body", b"", b"12345")])])
    with pytest.raises(SystemExit) as ended:
        MessageReader(Connection(message[:-7])).read_requests()
    assert ended.value.code == 0


def test_bytes_after_the_batch_are_not_lost_in_silence():
    with pytest.raises(ValueError, match="3 bytes follow the end of the batch"):
        MessageReader(Connection(message_of([]) + b"abc")).read_requests()


def test_the_worker_reads_its_messages_so(monkeypatch):
    monkeypatch.setattr(otf_message_handler, "_retrieve_inference_msg", None)
    read_messages_in_large_pieces()
    assert otf_message_handler.retrieve_msg(Connection(b"I" + message_of([]), [1])) == (b"I", [])
