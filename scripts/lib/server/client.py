"""HTTP client of the detection server: one image, or many with several requests in flight."""

from __future__ import annotations

import random
import socket
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.exceptions import ChunkedEncodingError
from urllib3.exceptions import MaxRetryError, NewConnectionError, ReadTimeoutError

DEFAULT_URL = "http://127.0.0.1:8080/predictions/damoyolo"
MAX_CONNECT_S = 5.0  # a server that can be reached at all takes a connection at once
MAX_PAUSE_S = 2.0


class DetectionClientError(Exception):
    """Base of what a request can fail with."""


class ServerUnreachableError(DetectionClientError):
    """Nothing listens at the address."""


class ServerTimeoutError(DetectionClientError):
    """The server took the request and did not answer within the time limit."""


class ServerAnswerError(DetectionClientError):
    """The server answered with an error, or with something that is no detection result.

    `status` is the HTTP status code, `kind` the error body's `type` ("" where it has none).
    """

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(f"{status} {kind}: {message}" if kind else f"{status}: {message}")
        self.status = status
        self.kind = kind
        self.message = message


@dataclass(frozen=True)
class RequestOptions:
    """What a request asks for; None leaves the choice to the server.

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
            DetectionClientError: a class name does not fit into a header.
        """
        headers = {}
        if self.score_threshold is not None:
            headers["X-Detect-Score-Threshold"] = str(self.score_threshold)
        if self.iou_threshold is not None:
            headers["X-Detect-Iou-Threshold"] = str(self.iou_threshold)
        if self.max_detections is not None:
            headers["X-Detect-Max-Detections"] = str(self.max_detections)
        if self.classes is not None:
            unfit = [
                name for name in self.classes if not name.isascii() or not name.isprintable() or "," in name
            ]
            if unfit:
                raise DetectionClientError(
                    f"class {unfit[0]!r} does not fit into a request header: it takes printable ASCII "
                    "without commas; give the class id instead"
                )
            headers["X-Detect-Classes"] = ",".join(self.classes)
        if self.class_agnostic is not None:
            headers["X-Detect-Class-Agnostic"] = "true" if self.class_agnostic else "false"
        return headers


@dataclass(frozen=True)
class Outcome:
    """What became of one image: an answer (and the drawn image, where asked for), or an error."""

    index: int
    answer: dict[str, Any] | None = None
    drawn: bytes | None = None
    error: DetectionClientError | OSError | None = None


class DetectionClient:
    """Client of one model address; safe to use from several threads.

    url: address of the model's predictions.
    timeout_s: longest silence of the server before a request fails.
    attempts: how often an image is sent at most while the server's queue is full (status 503) or it drops
        the connection; asking twice is harmless, as detection changes nothing. Silence is not retried: the
        server may still be at work on the image.
    pause_s: pause before the second attempt; doubles with each further one, up to MAX_PAUSE_S, and varies by
        half so that the refused requests do not come back all at once.
    """

    def __init__(
        self, url: str = DEFAULT_URL, timeout_s: float = 60.0, attempts: int = 6, pause_s: float = 0.1
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DetectionClientError(
                f"the address is {url!r}; accepted is http(s)://host:port/predictions/model"
            )
        self.url = url
        self.timeout_s = timeout_s
        self.attempts = attempts
        self.pause_s = pause_s
        self._host_port = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        # A session serves one request at a time (requests does not promise more) and keeps its connection for
        # the next; append and pop of a list are atomic.
        self._idle_sessions: list[requests.Session] = []

    def __enter__(self) -> DetectionClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that no request uses."""
        while self._idle_sessions:
            self._idle_sessions.pop().close()

    def require_server(self) -> None:
        """Check that something listens at the address.

        Raises:
            ServerUnreachableError: nothing does.
        """
        try:
            socket.create_connection(self._host_port, timeout=min(MAX_CONNECT_S, self.timeout_s)).close()
        except OSError as error:
            raise self._unreachable() from error

    def detect(self, encoded: bytes, options: RequestOptions | None = None) -> dict[str, Any]:
        """The server's answer for one encoded image: `width`, `height` and `detections`.

        Raises:
            DetectionClientError: see its sub-classes.
        """
        response = self._post(encoded, options, "json")
        try:
            answer = response.json()
        except requests.exceptions.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict) or not isinstance(answer.get("detections"), list):
            raise ServerAnswerError(
                response.status_code,
                "",
                f"{self.url} answers something else than detections: {response.text[:200]!r}",
            )
        return answer

    def draw(
        self, encoded: bytes, options: RequestOptions | None = None, image_format: str = "jpeg"
    ) -> bytes:
        """The image with boxes and labels drawn on it, encoded; image_format is "jpeg" or "png".

        Raises:
            DetectionClientError: see its sub-classes.
        """
        return self._post(encoded, options, image_format).content

    def detect_many(
        self,
        images: Iterable[Path | bytes],
        options: RequestOptions | None = None,
        in_flight: int = 8,
        ordered: bool = True,
        draw: bool = False,
    ) -> Generator[Outcome, None, None]:
        """Detect in many images, files or encoded bytes, with up to `in_flight` requests at a time.

        Takes from `images` only as far as it is about to send. Yields one outcome an image, in the order
        given or, with `ordered=False`, as they come; an image that fails costs only itself. With `draw`
        every image is sent a second time, for its drawn form.
        """
        # In order, one slow image must not leave the others without work.
        window = 4 * in_flight if ordered else in_flight
        pending: deque[Future[Outcome]] = deque()
        executor = ThreadPoolExecutor(in_flight, thread_name_prefix="detect")
        try:
            for index, image in enumerate(images):
                pending.append(executor.submit(self._outcome, index, image, options, draw))
                if len(pending) >= window:
                    yield _take(pending, ordered)
            while pending:
                yield _take(pending, ordered)
        finally:
            executor.shutdown(cancel_futures=True)

    def _outcome(
        self, index: int, image: Path | bytes, options: RequestOptions | None, draw: bool
    ) -> Outcome:
        try:
            encoded = image.read_bytes() if isinstance(image, Path) else image
            answer = self.detect(encoded, options)
            return Outcome(index, answer, self.draw(encoded, options) if draw else None)
        except (DetectionClientError, OSError) as error:
            return Outcome(index, error=error)

    def _post(self, encoded: bytes, options: RequestOptions | None, output_format: str) -> requests.Response:
        """Send until there is an answer of status 200, at most `attempts` times."""
        headers = {
            **(options or RequestOptions()).headers(),
            "X-Detect-Format": output_format,
            "Content-Type": "application/octet-stream",
        }
        failure: DetectionClientError | None = None
        for attempt in range(self.attempts):
            if failure is not None:
                time.sleep(min(self.pause_s * 2 ** (attempt - 1), MAX_PAUSE_S) * random.uniform(0.5, 1.5))
            try:
                response = self._send(encoded, headers)
            except (requests.ConnectionError, requests.Timeout, ChunkedEncodingError) as error:
                if _is_unconnected(error):
                    raise self._unreachable() from error
                if _is_silence(error):
                    raise ServerTimeoutError(
                        f"no answer from {self.url} within {self.timeout_s:g} s; look whether its workers "
                        "are up (management API), or allow more time (--timeout)"
                    ) from error
                failure = DetectionClientError(
                    f"{self.url} dropped the connection {attempt + 1} times while handling "
                    f"{len(encoded):,} bytes; its log says why, max_request_size in config.properties is one "
                    "reason"
                )
                continue
            except requests.RequestException as error:
                raise DetectionClientError(f"cannot ask {self.url}: {error}") from error
            if response.status_code == 200:
                return response
            failure = _answer_error(response, len(encoded))
            if response.status_code != 503:
                break
        if failure is None:
            raise ValueError(f"attempts is {self.attempts}; at least 1 is needed")
        raise failure

    def _send(self, encoded: bytes, headers: dict[str, str]) -> requests.Response:
        try:
            session = self._idle_sessions.pop()
        except IndexError:
            session = requests.Session()
            # A proxy of the environment or a password in ~/.netrc is not meant for a detection server.
            session.trust_env = False
        try:
            return session.post(
                self.url,
                data=encoded,
                headers=headers,
                timeout=(min(MAX_CONNECT_S, self.timeout_s), self.timeout_s),
                allow_redirects=False,  # images go to the host that was named, or nowhere
            )
        finally:
            self._idle_sessions.append(session)

    def _unreachable(self) -> ServerUnreachableError:
        host, port = self._host_port
        return ServerUnreachableError(
            f"no server at {host}:{port}; start one with `python scripts/serve.py` or name another with --url"
        )


def _take(pending: deque[Future[Outcome]], ordered: bool) -> Outcome:
    """Wait for the first outcome, or for any, and take it out of `pending`."""
    if ordered:
        return pending.popleft().result()
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    future = done.pop()
    pending.remove(future)
    return future.result()


def _is_unconnected(error: requests.RequestException) -> bool:
    """Whether the connection was never made, in contrast to one that broke."""
    cause = error.args[0] if error.args else None
    refused = isinstance(cause, MaxRetryError) and isinstance(cause.reason, NewConnectionError)
    return refused or isinstance(error, requests.ConnectTimeout)


def _is_silence(error: requests.RequestException) -> bool:
    """Whether the server kept the connection and said nothing, before its answer or in the middle of it."""
    # requests calls a silence in the middle of a body a ConnectionError.
    cause = error.args[0] if error.args else None
    return isinstance(error, requests.Timeout) or isinstance(cause, ReadTimeoutError)


def _answer_error(response: requests.Response, sent_bytes: int) -> ServerAnswerError:
    """The error that a status other than 200 stands for, in the words of its JSON body where it has one."""
    status = response.status_code
    if 300 <= status < 400:
        target = response.headers.get("Location", "an unnamed place")
        return ServerAnswerError(
            status, "", f"redirects to {target}, which is not followed; give that as --url"
        )
    try:
        body = response.json()
    except requests.exceptions.JSONDecodeError:
        body = None
    if isinstance(body, dict) and "message" in body:
        return ServerAnswerError(status, str(body.get("type", "")), str(body["message"]))
    if status == 413:
        return ServerAnswerError(
            status,
            "",
            f"the server refuses {sent_bytes:,} bytes; max_request_size in config.properties sets the limit",
        )
    return ServerAnswerError(status, "", response.text[:200] or response.reason or "no explanation")
