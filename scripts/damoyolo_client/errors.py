"""The error of everything that the client cannot do."""

from __future__ import annotations


class ClientError(Exception):
    """Something cannot be read, sent or done; the message says what was found and what is accepted."""
