"""Read TorchServe's requests from the worker's socket in large pieces.

TorchServe 0.12 calls `recv` for every number and name of a request, some forty times. Here one call fetches
what has arrived, and the fields are cut out of it.
"""

from __future__ import annotations

import logging
import struct
import sys
from typing import Any, Protocol

from ts.protocol import otf_message_handler

RECEIVE_BYTES = 2**20
_INT = struct.Struct("!i")
_END_OF_LIST = -1


class _Connection(Protocol):
    def recv(self, size: int, /) -> bytes: ...


class MessageReader:
    """Cuts the fields of one message out of what a connection delivers."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._received = bytearray()
        self._position = 0

    def read_requests(self) -> list[dict[str, Any]]:
        """The requests of an inference message, as `otf_message_handler._retrieve_inference_msg` gives them.

        Nothing may follow the message: the server sends the next one after the answer to this one.
        """
        requests = []
        while (length := self._int()) != _END_OF_LIST:
            request: dict[str, Any] = {"requestId": self._bytes(length)}
            headers = []
            while (length := self._int()) != _END_OF_LIST:
                headers.append({"name": self._bytes(length), "value": self._bytes(self._int())})
            inputs = []
            while (length := self._int()) != _END_OF_LIST:
                name = self._bytes(length).decode("utf-8")
                content_type = self._bytes(self._int()).decode("utf-8")
                value = self._bytes(self._int())
                inputs.append({"name": name, "contentType": content_type, "value": value})
            requests.append({**request, "headers": headers, "parameters": inputs})
        if self._position != len(self._received):
            raise ValueError(f"{len(self._received) - self._position} bytes follow the end of the batch")
        return requests

    def _int(self) -> int:
        self._receive(_INT.size)
        (value,) = _INT.unpack_from(self._received, self._position)
        self._position += _INT.size
        return int(value)

    def _bytes(self, length: int) -> bytearray:
        self._receive(length)
        end = self._position + length
        value = self._received[self._position : end]
        self._position = end
        return value

    def _receive(self, needed: int) -> None:
        """Fetch until so many bytes beyond the position are there."""
        if self._position + needed <= len(self._received):
            return
        # What has been read is dropped, so that a batch is not held twice.
        del self._received[: self._position]
        self._position = 0
        while len(self._received) < needed:
            piece = self._connection.recv(RECEIVE_BYTES)
            if not piece:
                logging.info("Frontend disconnected.")
                sys.exit(0)
            self._received += piece


def read_messages_in_large_pieces() -> None:
    """Let this worker process read its requests with `MessageReader`. JSON and text stay undecoded."""
    otf_message_handler._retrieve_inference_msg = lambda connection: MessageReader(connection).read_requests()
