"""A client of the detection server: images in, detections out.

with Client("http://127.0.0.1:8080") as client:
    answer = client.detect("image.jpg")

docs/commands.md has more. What is imported here is loaded at its first use, so that commands start quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from damoyolo_client.answers import Arrays as Arrays
    from damoyolo_client.answers import NoAnswerError as NoAnswerError
    from damoyolo_client.answers import ServerAnswerError as ServerAnswerError
    from damoyolo_client.answers import as_arrays as as_arrays
    from damoyolo_client.client import Client as Client
    from damoyolo_client.client import Outcome as Outcome
    from damoyolo_client.client import RequestOptions as RequestOptions
    from damoyolo_client.errors import ClientError as ClientError

_MODULES = {
    "Arrays": "answers",
    "Client": "client",
    "ClientError": "errors",
    "NoAnswerError": "answers",
    "Outcome": "client",
    "RequestOptions": "client",
    "ServerAnswerError": "answers",
    "as_arrays": "answers",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
