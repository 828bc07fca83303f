"""A real TorchServe under arbitrary files and arbitrary bytes on its socket, beside good requests."""

import contextlib
import json
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests

from lib.accuracy.agreement import differences

from doubles.corpus import write_corpus

TIMEOUT_S = 120
FORMS = ("raw", "form", "multipart", "json", "body-as-json", "drawn")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_file_harms_the_server_or_a_neighbour(server, project_dir, tmp_path):
    write_corpus(tmp_path / "corpus", 120)
    command = [
        sys.executable,
        "scripts/fuzz_server.py",
        tmp_path / "corpus",
        "--json",
        tmp_path / "fuzz.json",
    ]
    command += ["--url", server.inference_url, "--management-url", server.management_url]
    # Two cores that other work shares: seconds here bound hangs, not speed.
    command += ["--max-seconds", "30", "--forms", *FORMS]
    done = subprocess.run(command, cwd=project_dir, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = json.loads((tmp_path / "fuzz.json").read_text())
    assert len(attempts) == 120 * len(FORMS)
    # Whole images among them are answered.
    assert all(
        attempt["status"] == 200
        for attempt in attempts
        if "_whole" in attempt["file"] and attempt["form"] in ("raw", "form", "multipart", "json")
    )


def raw_requests(path, image):
    """Requests as bytes, from slightly wrong to noise."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n".encode()
    length = f"Content-Length: {len(image)}\r\n".encode()
    multipart = b"Content-Type: multipart/form-data"
    random = np.random.default_rng(3)
    yield head + b"\r\n"
    yield head + b"Content-Length: -1\r\n\r\n"
    yield head + b"Content-Length: 99999999999999999999\r\n\r\n"
    yield head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"
    yield head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n"
    yield head + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\nabc"
    yield head + length + b"Content-Encoding: gzip\r\n\r\n" + image
    yield head + length + b"Content-Type: text/plain; charset=nonsense\r\n\r\n" + image
    yield head + length + b"Content-Type: application/json; charset=nonsense\r\n\r\n" + image
    yield head + length + multipart + b"\r\n\r\n" + image
    yield head + length + multipart + b"; boundary=\r\n\r\n" + image
    yield head + length + multipart + b"; boundary=" + b"b" * 5000 + b"\r\n\r\n" + image
    body = b"--b\r\nContent-Disposition: form-data\r\n\r\nno name\r\n--b--\r\n"
    yield head + b"Content-Length: %d\r\n" % len(body) + multipart + b"; boundary=b\r\n\r\n" + body
    part = b'Content-Disposition: form-data; name="data"\r\nContent-Type: x; charset=?'
    body = b"--b\r\n" + part + b"\r\n\r\nx\r\n--b--\r\n"
    yield head + b"Content-Length: %d\r\n" % len(body) + multipart + b"; boundary=b\r\n\r\n" + body
    yield head + b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 9\r\n\r\n%zz=%&%=1"
    yield head + b"X-Detect-Classes: \xff\xfe\x01\r\nContent-Length: 1\r\n\r\nx"
    yield head + b"Describe: True\r\n" + length + b"\r\n" + image
    yield head + b"explain: True\r\n" + length + b"\r\n" + image
    yield head + b"A: b\r\n" * 2000 + b"\r\n"
    yield head.replace(b"HTTP/1.1", b"HTTP/9.9") + b"\r\n"
    yield b"GET " + b"/" * 9000 + b" HTTP/1.1\r\n\r\n"
    yield b"POST /predictions/../../etc/passwd HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    yield b"POST /predictions/%00%0a HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.bytes(200)
    for size in (1, 100, 20_000):
        yield random.bytes(size)


def send_raw(url, data, patience_s=5.0):
    """The status that comes back on a connection of its own; None if none does."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=patience_s) as connection:
        try:
            with contextlib.suppress(OSError):  # the server may have answered and closed already
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(100)
        except (TimeoutError, ConnectionError):
            return None
    return int(answer.split()[1]) if answer.startswith(b"HTTP/") else None


def test_no_bytes_on_the_socket_cost_more_than_their_connection(server, url, smear):
    path = urlsplit(url).path
    raw_type = {"Content-Type": "application/octet-stream"}
    expected = requests.post(url, data=smear, headers=raw_type, timeout=TIMEOUT_S).json()
    pids = [worker["pid"] for worker in workers(server)]
    statuses = {}
    for data in raw_requests(path, smear):
        statuses[data[:200]] = send_raw(url, data)
    # Not equal to the last digit: one of the requests above may be in the same batch.
    found = requests.post(url, data=smear, headers=raw_type, timeout=TIMEOUT_S).json()
    assert not differences(found["detections"], expected["detections"])
    assert [worker["pid"] for worker in workers(server)] == pids
    failed = {data: status for data, status in statuses.items() if status is not None and status >= 500}
    assert not failed


def workers(server):
    answer = requests.get(f"{server.management_url}/models/{server.model_name}", timeout=TIMEOUT_S)
    return answer.json()[0]["workers"]
