"""Define the errors of the package.

A message says what was found, what is accepted, and which setting changes that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class DamoYoloError(Exception):
    """Base of everything that this package raises on purpose."""


class ConfigError(DamoYoloError, ValueError):
    """A serving setting is unknown, of the wrong type, or out of range."""


class CheckpointError(DamoYoloError):
    """A checkpoint cannot be read or does not fit the requested network."""


class RequestError(DamoYoloError):
    """One request cannot be answered; the others of its batch are not affected.

    `status` is the HTTP status code, `reason` its phrase (ASCII, one line) and `kind` the machine-readable
    name that goes into the `type` field of the error body.
    """

    status = 400
    reason = "Bad Request"
    kind = "BadRequest"


class InvalidOptionError(RequestError):
    """A per-request option is unknown, malformed or out of range."""

    kind = "InvalidOption"


class MissingImageError(RequestError):
    """The request has no image in any accepted place."""

    kind = "MissingImage"


class ImageTooLargeError(RequestError):
    """The image has more bytes or pixels than the server accepts."""

    status = 413
    reason = "Payload Too Large"
    kind = "ImageTooLarge"


class UnsupportedImageError(RequestError):
    """The bytes are not an image of an accepted format."""

    status = 415
    reason = "Unsupported Media Type"
    kind = "UnsupportedImage"


class CorruptImageError(RequestError):
    """The header names an accepted format, but the pixels cannot be decoded."""

    status = 422
    reason = "Unprocessable Content"
    kind = "CorruptImage"


class InternalError(RequestError):
    """The server failed at this request through no fault of the client."""

    status = 500
    reason = "Internal Server Error"
    kind = "InternalError"


class BatchTimeError(RequestError):
    """The batch has taken so long that this request was not begun; it may succeed when it is sent again."""

    status = 503
    reason = "Service Unavailable"
    kind = "BatchTime"


class DeviceMemoryError(RequestError):
    """The device has too little free memory even for this one request."""

    status = 507
    reason = "Insufficient Storage"
    kind = "OutOfMemory"


class DeviceLostError(DamoYoloError):
    """The device context is broken for good; only a new process can serve again."""


def quoted(value: Any) -> str:
    """What a client sent, for a message: ASCII, escaped, at most 60 characters."""
    if isinstance(value, list | Mapping):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, str | bytes | bytearray | memoryview):
        value = str(value[:60]) if isinstance(value, str) else bytes(value[:60])
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
