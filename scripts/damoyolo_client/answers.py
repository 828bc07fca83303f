"""What the server answered: a detection result, or an error; nothing in an answer is trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import urllib3
from urllib3.exceptions import DecodeError

from damoyolo_client.command_line import printable
from damoyolo_client.errors import ClientError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A full queue or no worker; a proxy in front says 502 and 504 for a server that is starting.
PASSING_STATUSES = (502, 503, 504)
MAX_NUMBER = 1e9  # of a score or a side of a box in pixels; excludes infinity and NaN
# Well above max_response_size of config.properties, 34 MB.
MAX_ANSWER_BYTES = 64 * 2**20
CHUNK_BYTES = 2**20
WORKER_DIED = "Worker died."  # TorchServe's message of a 500 or 507


class RequestFailedError(ClientError):
    """A request that the client could not get a result for.

    passes: whether another attempt may succeed. lost: whether the server had the image when it failed.
    attempts: how many were made.
    """

    def __init__(self, message: str, passes: bool, lost: bool) -> None:
        super().__init__(message)
        self.passes = passes
        self.lost = lost
        self.attempts = 1

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.attempts == 1 else f"{message} (attempt {self.attempts})"


class NoAnswerError(RequestFailedError):
    """The server gave no answer."""

    def __init__(self, message: str, passes: bool = True, lost: bool = False) -> None:
        super().__init__(message, passes, lost)


class ServerAnswerError(RequestFailedError):
    """The server answered with an error, or with something that is no detection result.

    A class of its own because its parts are reported one by one: `status` is the HTTP status code, `kind` the
    error body's `type` ("" where it has none). Both texts are the server's, without control characters.
    """

    def __init__(self, status: int, kind: str, message: str) -> None:
        self.status = status
        self.kind = printable(kind)
        self.message = printable(message)
        worker_died = status in (500, 507) and WORKER_DIED in message
        super().__init__(
            f"{status} {self.kind}: {self.message}" if kind else f"{status}: {self.message}",
            passes=status in PASSING_STATUSES or worker_died,
            lost=worker_died,
        )


@dataclass(frozen=True)
class HttpAnswer:
    """An answer that was read to its end; `data` is its body, decompressed."""

    status: int
    reason: str
    headers: Mapping[str, str]
    data: bytes


def read_answer(response: urllib3.BaseHTTPResponse) -> HttpAnswer:
    """Read the body, of at most MAX_ANSWER_BYTES after decompression.

    Raises:
        ServerAnswerError: it is larger, or damaged.
        urllib3.exceptions.HTTPError: it did not arrive.
    """
    data = bytearray()
    complete = False
    try:
        for chunk in response.stream(CHUNK_BYTES):
            data += chunk
            if len(data) > MAX_ANSWER_BYTES:
                raise ServerAnswerError(
                    response.status,
                    "",
                    f"the answer is larger than {MAX_ANSWER_BYTES:,} bytes, the most that is read",
                )
        complete = True
    except DecodeError as error:
        raise ServerAnswerError(
            response.status, "", f"the answer cannot be decompressed: {error.args[0]}"
        ) from error
    finally:
        if complete:
            response.release_conn()
        else:
            response.close()  # what is left of it must not be taken for the next answer
    return HttpAnswer(response.status, response.reason or "", response.headers, bytes(data))


def answer_error(response: HttpAnswer, sent_bytes: int) -> ServerAnswerError:
    """The error that a status other than 200 stands for, in the words of its JSON body where it has one."""
    status, kind = response.status, ""
    body = json_of(response)
    if 300 <= status < 400:
        target = response.headers.get("Location", "an unnamed place")
        message = f"redirects to {target}, which is not followed; if that is the server, name it"
    elif isinstance(body, dict) and "message" in body:
        kind, message = str(body.get("type", "")), str(body["message"])
    elif status == 413:
        message = (
            f"the server refuses {sent_bytes:,} bytes; max_request_size in config.properties sets the limit"
        )
    else:
        message = text_of(response) or response.reason or "no explanation"
    return ServerAnswerError(status, kind, message)


def json_of(response: HttpAnswer) -> Any:
    """The body as JSON; None where it is none."""
    try:
        return json.loads(response.data)
    except (ValueError, RecursionError):  # RecursionError: of brackets without end
        return None


def detection_result(response: HttpAnswer) -> dict[str, Any]:
    """The body as a result: `width` and `height` in pixels, and `detections`, each with class_id, label,
    score and four box sides.

    Raises:
        ServerAnswerError: it is something else.
    """
    answer = json_of(response)
    found = answer.get("detections") if isinstance(answer, dict) else None
    is_result = isinstance(found, list) and all(map(_is_detection, found))
    if not is_result or not all(_is_size(answer.get(side)) for side in ("width", "height")):
        raise ServerAnswerError(response.status, "", f"the answer is no result: {text_of(response)!r}")
    result: dict[str, Any] = answer
    return result


def _is_detection(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and isinstance(found.get("label"), str)
        and isinstance(found.get("class_id"), int)
        and not isinstance(found["class_id"], bool)
        and found["class_id"] >= 0
        and isinstance(found.get("bbox"), list)
        and len(found["bbox"]) == 4
        and all(_is_finite(number) for number in (found.get("score"), *found["bbox"]))
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_NUMBER


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def text_of(response: HttpAnswer) -> str:
    """The beginning of the body."""
    return response.data[:200].decode(errors="replace")


class Arrays(NamedTuple):
    """The N detections of an image as arrays, by descending score.

    boxes_xyxy: (N, 4) float32, in pixels of the image as a viewer shows it. scores: (N,) float32, 0..1.
    class_ids: (N,) int64. labels: N names of classes.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    labels: tuple[str, ...]


def as_arrays(answer: Mapping[str, Any]) -> Arrays:
    """An answer of `Client.detect` as arrays."""
    import numpy as np

    found = answer["detections"]
    return Arrays(
        np.array([each["bbox"] for each in found], np.float32).reshape(-1, 4),
        np.array([each["score"] for each in found], np.float32),
        np.array([each["class_id"] for each in found], np.int64),
        tuple(each["label"] for each in found),
    )
