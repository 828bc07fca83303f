"""Send images to the detection server over HTTP: one, or many with several requests in flight."""

from __future__ import annotations

import json
import socket
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import certifi
import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    ProtocolError,
    ReadTimeoutError,
)

from lib.cli import ScriptError
from lib.server import DEFAULT_URL

MAX_CONNECT_S = 5.0  # a reachable server accepts a connection at once
MAX_BACKOFF_S = 2.0
MAX_CONNECTIONS = 256  # kept open for the next request


class ServerAnswerError(ScriptError):
    """The server answered with an error, or with something that is no detection result.

    A class of its own because its parts are reported one by one: `status` is the HTTP status code, `kind` the
    error body's `type` ("" where it has none).
    """

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(f"{status} {kind}: {message}" if kind else f"{status}: {message}")
        self.status = status
        self.kind = kind
        self.message = message


@dataclass(frozen=True)
class RequestOptions:
    """The options of a request; None leaves the choice to the server.

    score_threshold, iou_threshold: 0..1. max_detections: at least 1.
    classes: names or ids of the only classes wanted.
    """

    score_threshold: float | None = None
    iou_threshold: float | None = None
    max_detections: int | None = None
    classes: tuple[str, ...] | None = None
    class_agnostic: bool | None = None

    def headers(self) -> dict[str, str]:
        """The request headers that carry the options.

        Raises:
            ScriptError: a class name does not fit into a header.
        """
        for name in self.classes or ():
            if not name.isascii() or not name.isprintable() or "," in name:
                raise ScriptError(
                    f"class {name!r} does not fit into a request header: it takes printable ASCII without "
                    "commas; give the class id instead"
                )
        fields = {
            "Score-Threshold": self.score_threshold,
            "Iou-Threshold": self.iou_threshold,
            "Max-Detections": self.max_detections,
            "Classes": None if self.classes is None else ",".join(self.classes),
            "Class-Agnostic": None if self.class_agnostic is None else str(self.class_agnostic).lower(),
        }
        return {f"X-Detect-{name}": str(value) for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Outcome:
    """The result of one image: an answer (and the drawn image, where requested), or an error."""

    index: int
    answer: dict[str, Any] | None = None
    drawn: bytes | None = None
    error: ScriptError | OSError | None = None


class DetectionClient:
    """Client of one model address; safe to use from several threads.

    Proxies of the environment and passwords in ~/.netrc are not used.

    url: address of the model's predictions.
    timeout_s: longest silence of the server before a request fails.
    attempts: how often an image is sent at most while the server's queue is full (status 503) or it drops
        the connection; sending again is harmless, as detection changes nothing. A request that timed out is
        not sent again.
    pause_s: base of the exponential back-off between attempts, up to MAX_BACKOFF_S.
    """

    def __init__(
        self, url: str = DEFAULT_URL, timeout_s: float = 60.0, attempts: int = 6, pause_s: float = 0.1
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ScriptError(f"the address is {url!r}; accepted is http(s)://host:port/predictions/model")
        self.url = url
        self.timeout_s = timeout_s
        self.attempts = attempts
        self._host_port = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        self._connect_s = min(MAX_CONNECT_S, timeout_s)
        retry = _Retry(
            attempts - 1,
            connect=0,
            other=0,
            allowed_methods=None,  # all
            status_forcelist=[503],
            raise_on_status=False,
            respect_retry_after_header=False,
            backoff_factor=pause_s,
            backoff_jitter=pause_s,  # so that refused requests do not come back all at once
            backoff_max=MAX_BACKOFF_S,
        )
        self._pool = urllib3.PoolManager(
            maxsize=MAX_CONNECTIONS,
            retries=retry,
            timeout=urllib3.Timeout(connect=self._connect_s, read=timeout_s),
            ca_certs=certifi.where(),
        )

    def __enter__(self) -> DetectionClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.clear()

    def require_server(self) -> None:
        """Check that something listens at the address.

        Raises:
            ScriptError: nothing does.
        """
        try:
            socket.create_connection(self._host_port, timeout=self._connect_s).close()
        except OSError as error:
            raise self._unreachable() from error

    def detect(self, encoded: bytes, options: RequestOptions | None = None) -> dict[str, Any]:
        """The server's answer for one encoded image: `width`, `height` and `detections`.

        Raises:
            ServerAnswerError: the server answered with an error.
            ScriptError: it gave no answer.
        """
        response = self._post(encoded, options, "json")
        answer = _json_of(response)
        if not isinstance(answer, dict) or not isinstance(answer.get("detections"), list):
            raise ServerAnswerError(
                response.status, "", f"{self.url} answered no detections: {_text_of(response)!r}"
            )
        return answer

    def draw(self, encoded: bytes, options: RequestOptions | None = None) -> bytes:
        """The image with boxes and labels drawn on it, as JPEG.

        Raises:
            ServerAnswerError, ScriptError: as `detect`.
        """
        return self._post(encoded, options, "jpeg").data

    def detect_many(
        self,
        images: Iterable[Path | bytes],
        options: RequestOptions | None = None,
        in_flight: int = 8,
        draw: bool = False,
    ) -> Generator[Outcome, None, None]:
        """Detect in many images, files or encoded bytes, with up to `in_flight` requests at a time.

        Takes from `images` only as far as it is about to send. Yields one outcome per image in the order
        given; an image that fails does not affect the others. With `draw` every image is sent a second time,
        for its drawn form.
        """
        window = 4 * in_flight  # one slow image must not leave the other threads without work
        pending: deque[Future[Outcome]] = deque()
        executor = ThreadPoolExecutor(in_flight, thread_name_prefix="detect")
        try:
            for index, image in enumerate(images):
                pending.append(executor.submit(self._outcome, index, image, options, draw))
                if len(pending) >= window:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)

    def _outcome(
        self, index: int, image: Path | bytes, options: RequestOptions | None, draw: bool
    ) -> Outcome:
        try:
            encoded = image.read_bytes() if isinstance(image, Path) else image
            answer = self.detect(encoded, options)
            return Outcome(index, answer, self.draw(encoded, options) if draw else None)
        except (ScriptError, OSError) as error:
            return Outcome(index, error=error)

    def _post(
        self, encoded: bytes, options: RequestOptions | None, output_format: str
    ) -> urllib3.BaseHTTPResponse:
        """The response of status 200."""
        headers = {
            **(options or RequestOptions()).headers(),
            "X-Detect-Format": output_format,
            "Content-Type": "application/octet-stream",
        }
        try:
            # Images go to the host that was named and nowhere else: no redirects.
            response = self._pool.request("POST", self.url, body=encoded, headers=headers, redirect=False)
        except HTTPError as error:
            raise self._failure(error, len(encoded)) from error
        if response.status != 200:
            raise _answer_error(response, len(encoded))
        return response

    def _failure(self, error: HTTPError, sent_bytes: int) -> ScriptError:
        """What an exchange without an answer means to the user."""
        reason = error.reason if isinstance(error, MaxRetryError) else error
        if isinstance(reason, ConnectTimeoutError):  # refused connections and unknown hosts, too
            return self._unreachable()
        if isinstance(reason, ReadTimeoutError):
            return ScriptError(
                f"no answer from {self.url} within {self.timeout_s:g} s; check that its workers are up "
                "(management API), or allow more time (--timeout)"
            )
        if isinstance(reason, ProtocolError):
            return ScriptError(
                f"{self.url} dropped the connection in attempt {self.attempts} of {self.attempts} to send "
                f"{sent_bytes:,} bytes; its log says why. One reason: max_request_size in config.properties"
            )
        return ScriptError(f"cannot send to {self.url}: {reason}")

    def _unreachable(self) -> ScriptError:
        host, port = self._host_port
        return ScriptError(
            f"no server at {host}:{port}; start one with `python scripts/serve.py` or name another with --url"
        )


class _Retry(urllib3.Retry):
    """Retries unless the server was silent: it may still be at work on the image."""

    def increment(self, method: str | None = None, url: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("error"), ReadTimeoutError):
            raise kwargs["error"]
        return super().increment(method, url, *args, **kwargs)


def _answer_error(response: urllib3.BaseHTTPResponse, sent_bytes: int) -> ServerAnswerError:
    """The error that a status other than 200 stands for, in the words of its JSON body where it has one."""
    status, kind = response.status, ""
    body = _json_of(response)
    if 300 <= status < 400:
        target = response.headers.get("Location", "an unnamed place")
        message = f"redirects to {target}, which is not followed; give that as --url"
    elif isinstance(body, dict) and "message" in body:
        kind, message = str(body.get("type", "")), str(body["message"])
    elif status == 413:
        message = (
            f"the server refuses {sent_bytes:,} bytes; max_request_size in config.properties sets the limit"
        )
    else:
        message = _text_of(response) or response.reason or "no explanation"
    return ServerAnswerError(status, kind, message)


def _json_of(response: urllib3.BaseHTTPResponse) -> Any:
    """The body as JSON; None where it is none."""
    try:
        return json.loads(response.data)
    except ValueError:
        return None


def _text_of(response: urllib3.BaseHTTPResponse) -> str:
    """The beginning of the body."""
    return response.data[:200].decode(errors="replace")
