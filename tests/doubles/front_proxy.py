"""The HAProxy of deploy/production before a server of tests, and clients that talk to it byte by byte."""

import contextlib
import hashlib
import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time

from lib.server.process import free_ports, is_listening

from doubles.real_server import wait_until

HAPROXY = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
TIMEOUT_S = 60.0
DEAD_URL = "http://127.0.0.1:9"


class FrontProxy:
    """HAProxy with the shipped configuration, on free ports.

    folder: gets the certificate, the tokens and the log. server: a ServedModel, or None for one that is down.
    environment: further variables.
    """

    def __init__(self, project_dir, folder, server, **environment):
        self.project_dir, self.folder, self.server = project_dir, folder, server
        self.environment = environment
        self.port, self.operations_port = free_ports(2)
        self.tokens = {}

    @contextlib.contextmanager
    def running(self):
        """HAProxy inside the context."""
        self._make_certificate()
        self._make_tokens()
        log = self.log = self.folder / "haproxy.log"
        with log.open("w") as output:
            # A master and a worker, as in production.
            process = self.process = subprocess.Popen(
                [HAPROXY, "-W", *self._files()], env=self._environment(), stdout=output, stderr=output
            )
        try:
            wait_until(lambda: is_listening(self.port) or process.poll() is not None, "HAProxy", 20.0)
            assert process.poll() is None, log.read_text()
            yield self
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            process.wait(20)

    def reload(self):
        """Let HAProxy read its files again."""
        self._files()
        wait_until(lambda: self._started_workers() > 0, "the first worker", 20.0)
        before = self._started_workers()
        for _ in range(4):  # the master loses a signal that comes while it starts a worker
            self.process.send_signal(signal.SIGUSR2)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: self._started_workers() > before, "the new worker", 5.0)
                return
        raise AssertionError(f"no new worker:\n{self.log.read_text()}")

    def _started_workers(self):
        return self.log.read_text().count("Loading success.")

    def check(self):
        """What `haproxy -c` says about the configuration."""
        self._make_certificate()
        self._make_tokens()
        return subprocess.run(
            [HAPROXY, "-c", *self._files()], env=self._environment(), capture_output=True, text=True
        )

    def _files(self):
        folder = self.project_dir / "deploy/production"
        root = ["-f", str(folder / "privileges.cfg")] if os.getuid() == 0 else []
        return [*root, "-f", str(folder / "haproxy.cfg")]

    def _environment(self):
        served = self.server
        urls = [served.inference_url, served.management_url, served.metrics_url] if served else [DEAD_URL] * 3
        names = ("DAMOYOLO_INFERENCE", "DAMOYOLO_MANAGEMENT", "DAMOYOLO_METRICS")
        return {
            **os.environ,
            **dict(zip(names, (url.removeprefix("http://") for url in urls), strict=True)),
            "DAMOYOLO_PUBLIC": f"127.0.0.1:{self.port}",
            "DAMOYOLO_OPERATIONS": f"127.0.0.1:{self.operations_port}",
            "DAMOYOLO_CERTIFICATE": str(self.folder / "certificate/server.pem"),
            "DAMOYOLO_TOKENS": str(self.folder / "tokens.map"),
            **self.environment,
        }

    def _make_certificate(self):
        script = self.project_dir / "deploy/production/test_certificate.sh"
        subprocess.run([script, self.folder / "certificate"], check=True, capture_output=True)
        self.context = ssl.create_default_context(cafile=self.folder / "certificate/ca.pem")

    def _make_tokens(self):
        script, file = self.project_dir / "deploy/production/new_token.sh", self.folder / "tokens.map"
        for name, role in (("inference", "inference"), ("slow", "inference"), ("operations", "operations")):
            made = subprocess.run([script, role, "1", name, file], check=True, capture_output=True, text=True)
            self.tokens[name] = made.stdout.strip()
        self.tokens |= {"wrong": "0" * 64, "expired": "f" * 64}
        digest = hashlib.sha256(self.tokens["expired"].encode()).hexdigest().upper()
        with file.open("a") as opened:
            opened.write(f"{digest} inference:{int(time.time()) - 1}:former\n")

    def headers(self, token):
        """The headers of a request with the token of this name; None has none."""
        return {} if token is None else {"Authorization": f"Bearer {self.tokens[token]}"}

    def request(self, method, path, body=None, token="inference", port=None, **headers):
        """Status, headers and body; the path goes out as it is, with dots and per cent signs."""
        connection = http.client.HTTPSConnection(
            "127.0.0.1", port or self.port, context=self.context, timeout=TIMEOUT_S
        )
        with contextlib.closing(connection):
            connection.request(method, path, body, {**self.headers(token), **headers})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def connect(self, source="127.0.0.1", tls=True, port=None):
        """A connection from this address of the loopback network, to the public port or another."""
        address = ("127.0.0.1", port or self.port)
        plain = socket.create_connection(address, TIMEOUT_S, source_address=(source, 0))
        return self.context.wrap_socket(plain, server_hostname="127.0.0.1") if tls else plain


class SlowClient(threading.Thread):
    """Sends `first` at once, then a byte a second until the connection is closed.

    `seconds` is the time from the first byte to the end, None before it; `answer` is what came.
    """

    def __init__(self, connection, first, drip):
        super().__init__(daemon=True)
        self.connection, self.first, self.drip = connection, first, drip
        self.answer, self.seconds, self.stopped = b"", None, threading.Event()
        self.start()

    def run(self):
        """Send until the other side closes."""
        started = time.monotonic()
        with contextlib.suppress(OSError), self.connection:
            self.connection.sendall(self.first)
            self.connection.settimeout(1.0)
            while not self.stopped.is_set():
                try:
                    received = self.connection.recv(4096)
                except TimeoutError:
                    self.connection.sendall(self.drip)
                    continue
                if not received:
                    break
                self.answer += received
        if not self.stopped.is_set():
            self.seconds = time.monotonic() - started
