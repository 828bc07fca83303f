"""Send images to the detection server over HTTP: one, or many with several requests in flight."""

from __future__ import annotations

import functools
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import certifi
import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
)

from damoyolo_client.answers import (
    HttpAnswer,
    NoAnswerError,
    ServerAnswerError,
    answer_error,
    detection_result,
    read_answer,
)
from damoyolo_client.command_line import DEFAULT_MODEL, DEFAULT_RETRY_S, DEFAULT_URL
from damoyolo_client.errors import ClientError
from damoyolo_client.images import encoded
from damoyolo_client.retry import FIRST_PAUSE_S, Attempts, Outage
from damoyolo_client.threads import DaemonThreads

if TYPE_CHECKING:
    from damoyolo_client.images import Image

MAX_CONNECT_S = 5.0  # a reachable server accepts a connection at once
MAX_CONNECTIONS = 256  # kept open for the next request
TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, section 2.1


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
            ClientError: a class name does not fit into a header.
        """
        for name in self.classes or ():
            if not name.isascii() or not name.isprintable() or "," in name:
                raise ClientError(
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
    """The result of one image: an answer (and the drawn image, where requested), or an error.

    seconds: from the first attempt to the answer.
    """

    index: int
    answer: dict[str, Any] | None = None
    drawn: bytes | None = None
    error: ClientError | OSError | None = None
    seconds: float = 0.0


class Client:
    """Client of one model of a server; safe to use from several threads.

    Proxies of the environment and passwords in ~/.netrc are not used.

    A failure that passes is followed by another attempt, as sending again is harmless: detection changes
    nothing. Such are a full queue or a missing worker (502, 503, 504), a worker that died (500 or 507 of
    TorchServe), a refused or dropped connection, and silence.

    url: address of the server's inference port.
    model: name of the served model.
    timeout_s: longest silence of the server in one attempt.
    retry_s: how long an image is sent again after such failures (retry.py); 0 for a single attempt.
    pause_s: the first pause between attempts.
    token: sent with each request, for a server behind deploy/production.
    ca_file: authority of the server's certificate, PEM; None takes those that certifi knows.

    repeated: how many requests were sent again so far.

    Raises:
        ClientError: `url` is no HTTP address of a port alone, `token` has characters that none has, or
            `ca_file` is not a file.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        model: str = DEFAULT_MODEL,
        timeout_s: float = 60.0,
        retry_s: float = DEFAULT_RETRY_S,
        pause_s: float = FIRST_PAUSE_S,
        token: str | None = None,
        ca_file: str | Path | None = None,
    ) -> None:
        self._host_port = _host_and_port(url)
        if token is not None and not TOKEN.fullmatch(token):  # not shown: it may be right but for a line end
            raise ClientError("the token has characters that no token has, blanks or line ends, say")
        if ca_file is not None and not Path(ca_file).is_file():
            raise ClientError(f"the certificate authority is {str(ca_file)!r}, which is not a file")
        self.url = f"{url.rstrip('/')}/predictions/{quote(model, safe='')}"
        self.timeout_s = timeout_s
        self.retry_s = retry_s
        self.pause_s = pause_s
        self.repeated = 0
        self._connect_s = min(MAX_CONNECT_S, timeout_s)
        self._outage = Outage()
        self._lock = threading.Lock()
        self._pool = urllib3.PoolManager(
            maxsize=MAX_CONNECTIONS,
            retries=False,
            timeout=urllib3.Timeout(connect=self._connect_s, read=timeout_s),
            ca_certs=certifi.where() if ca_file is None else str(ca_file),
        )
        self._authorization = {} if token is None else {"Authorization": f"Bearer {token}"}

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.clear()

    def require_server(self) -> None:
        """Check that something listens at the address.

        Raises:
            ClientError: nothing does.
        """
        try:
            socket.create_connection(self._host_port, timeout=self._connect_s).close()
        except (OSError, UnicodeError) as error:  # UnicodeError: of a host name that cannot be looked up
            raise self._unreachable() from error

    def detect(
        self,
        image: Image,
        options: RequestOptions | None = None,
        cancelled: threading.Event | None = None,
    ) -> dict[str, Any]:
        """The server's answer for one image: `width`, `height` and `detections`; `as_arrays` converts it.

        cancelled: once set, no further attempt is made.

        Raises:
            ServerAnswerError: the server answered with an error, or with something that is no result.
            ClientError: it gave no answer, or the image cannot be downloaded or encoded.
            OSError: the image cannot be read.
        """
        return detection_result(self._post(encoded(image), options, "json", cancelled))

    def draw(
        self,
        image: Image,
        options: RequestOptions | None = None,
        cancelled: threading.Event | None = None,
    ) -> bytes:
        """The image with boxes and labels drawn on it, as JPEG.

        Raises:
            ServerAnswerError, ClientError, OSError: as `detect`.
        """
        return self._post(encoded(image), options, "jpeg", cancelled).data

    def detect_many(
        self,
        images: Iterable[Image],
        options: RequestOptions | None = None,
        in_flight: int = 8,
        draw: bool = False,
    ) -> Generator[Outcome, None, None]:
        """Detect in many images, with up to `in_flight` requests at a time.

        Takes from `images` only as far as it is about to send. Yields one outcome per image in the order
        given; an image that fails does not affect the others. With `draw` every image is sent a second time,
        for its drawn form. Closing the generator abandons the requests under way.
        """
        window = 4 * in_flight  # one slow image must not leave the other threads without work
        pending: deque[Future[Outcome]] = deque()
        cancelled = threading.Event()

        def outcome(index: int, image: Image) -> Outcome:
            return self._outcome(index, image, options, draw, cancelled)

        with DaemonThreads(in_flight) as threads:
            try:
                for index, image in enumerate(images):
                    pending.append(threads.submit(functools.partial(outcome, index, image)))
                    if len(pending) >= window:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                cancelled.set()
                for future in pending:
                    future.cancel()

    def _outcome(
        self,
        index: int,
        image: Image,
        options: RequestOptions | None,
        draw: bool,
        cancelled: threading.Event,
    ) -> Outcome:
        try:
            data = encoded(image)
            start_s = time.perf_counter()
            answer = self.detect(data, options, cancelled)
            seconds = time.perf_counter() - start_s
            drawn = self.draw(data, options, cancelled) if draw else None
            return Outcome(index, answer, drawn, seconds=seconds)
        except (ClientError, OSError) as error:
            return Outcome(index, error=error)

    def _post(
        self,
        data: bytes,
        options: RequestOptions | None,
        output_format: str,
        cancelled: threading.Event | None,
    ) -> HttpAnswer:
        """The answer of status 200."""
        headers = {
            **(options or RequestOptions()).headers(),
            "X-Detect-Format": output_format,
            "Content-Type": "application/octet-stream",
            **self._authorization,
        }
        attempts = Attempts(self.retry_s, self._outage, cancelled or threading.Event(), self.pause_s)
        while True:
            try:
                answer = self._exchange(data, headers)
            except (ServerAnswerError, NoAnswerError) as error:
                if not error.passes:
                    if isinstance(error, ServerAnswerError):
                        self._outage.answered()
                    raise
                if not attempts.wait_for_next(error.lost):
                    error.attempts = attempts.made
                    raise
                with self._lock:
                    self.repeated += 1
            else:
                self._outage.answered()
                return answer

    def _exchange(self, data: bytes, headers: Mapping[str, str]) -> HttpAnswer:
        """One attempt; the answer of status 200."""
        try:
            # Images go to the host that was named and nowhere else: no redirects.
            response = self._pool.request(
                "POST", self.url, body=data, headers=headers, redirect=False, preload_content=False
            )
            answer = read_answer(response)
        except HTTPError as error:
            raise self._failure(error, len(data)) from error
        if answer.status != 200:
            raise answer_error(answer, len(data))
        return answer

    def _failure(self, error: HTTPError, sent_bytes: int) -> NoAnswerError:
        """What an exchange without an answer means to the user."""
        reason = error.reason if isinstance(error, MaxRetryError) else error
        if isinstance(reason, ConnectTimeoutError | NewConnectionError):  # unknown hosts, too
            return self._unreachable()
        if isinstance(reason, ReadTimeoutError):
            return NoAnswerError(
                f"no answer from {self.url} within {self.timeout_s:g} s; check that its workers are up "
                "(management API), or allow more time (--timeout)",
                lost=True,
            )
        if isinstance(reason, ProtocolError):
            return NoAnswerError(
                f"{self.url} dropped the connection while {sent_bytes:,} bytes were sent or answered; its "
                "log says why. One reason: max_request_size in config.properties",
                lost=True,
            )
        return NoAnswerError(f"cannot send to {self.url}: {reason}", passes=False)

    def _unreachable(self) -> NoAnswerError:
        host, port = self._host_port
        return NoAnswerError(
            f"no server at {host}:{port}; start one with `python scripts/serve.py` or name another with --url"
        )


def _host_and_port(url: str) -> tuple[str, int]:
    """What the address names.

    Raises:
        ClientError: it is not one of HTTP, or not that of the port alone.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # of a port that is no number, or an unfinished IPv6 address
        host = None
    if not host or parts.scheme not in ("http", "https") or not url.isprintable() or " " in url:
        raise ClientError(f"the address is {url!r}; accepted is http(s)://host:port")
    if "/predictions" in parts.path or parts.query:
        raise ClientError(
            f"the address is {url!r}; accepted is http(s)://host:port, that of the inference port without "
            "/predictions/...; the model is named apart"
        )
    return host, port or (443 if parts.scheme == "https" else 80)
