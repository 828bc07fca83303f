"""What the front of deploy/production refuses, and that it serves others meanwhile."""

import base64
import contextlib
import http.client
import json
import select
import socket
import ssl
import time

import pytest
import requests

from damoyolo_client import detect
from doubles.front_proxy import HAPROXY, FrontProxy, SlowClient
from doubles.real_server import wait_until

pytestmark = pytest.mark.skipif(
    HAPROXY is None, reason="haproxy is not installed (Debian: apt install haproxy)"
)

MODEL = "/predictions/damoyolo"
V2_MODEL = "/v2/models/damoyolo"
EVIL_URL = "url=http://127.0.0.1:9/evil.mar"
# `timeout http-request` and `timeout client` of haproxy.cfg; its timers have a resolution of a second.
PATIENCE_S = 10.0
# Nothing of the inside: stack traces, classes, paths.
INSIDE = (b"Traceback", b".java", b".py", b"\tat ", b"org.pytorch", b"/predictions/")
# What is asked for, with which token, and the answer's status and type.
REFUSALS = {
    "no token": ("POST", MODEL, None, 401, "NoToken"),
    "a wrong token": ("POST", MODEL, "wrong", 401, "WrongToken"),
    "an expired token": ("POST", MODEL, "expired", 401, "ExpiredToken"),
    "a token of operations for an image": ("POST", MODEL, "operations", 403, "Forbidden"),
    "another method": ("GET", MODEL, "inference", 405, "MethodNotAllowed"),
    "DELETE": ("DELETE", MODEL, "inference", 405, "MethodNotAllowed"),
    "management": ("GET", "/models", "inference", 404, "NotFound"),
    "registration by URL": ("POST", f"/models?{EVIL_URL}", "inference", 404, "NotFound"),
    "a workflow by URL": ("POST", f"/workflows?{EVIL_URL}", "inference", 404, "NotFound"),
    "scaling": ("PUT", "/models/damoyolo?min_worker=0", "inference", 404, "NotFound"),
    "metrics": ("GET", "/metrics", "inference", 404, "NotFound"),
    "a token of TorchServe": ("GET", "/token?type=management", "inference", 404, "NotFound"),
    "the description of the API": ("GET", "/api-description", "inference", 404, "NotFound"),
    "the root": ("OPTIONS", "/", "inference", 404, "NotFound"),
    "TorchServe's ping": ("GET", "/ping", "inference", 404, "NotFound"),
    "explanations": ("POST", "/explanations/damoyolo", "inference", 404, "NotFound"),
    "a path with dots": ("POST", "/predictions/../models", "inference", 404, "NotFound"),
    "a path with dots behind the model": ("POST", f"{MODEL}/../../models", "inference", 404, "NotFound"),
    "encoded dots": ("POST", "/predictions/%2e%2e/models", "inference", 404, "NotFound"),
    "encoded slashes": ("POST", "/predictions/..%2f..%2fmodels", "inference", 404, "NotFound"),
    "doubly encoded dots": ("POST", "/predictions/%252e%252e/models", "inference", 404, "NotFound"),
    "backslashes": ("POST", "/predictions/..\\..\\models", "inference", 404, "NotFound"),
    "two slashes": ("POST", "//predictions/damoyolo", "inference", 404, "NotFound"),
    "a null byte": ("POST", "/predictions/damoyolo%00.mar", "inference", 404, "NotFound"),
    "GET of a v2 prediction": ("GET", f"{V2_MODEL}/infer", "inference", 405, "MethodNotAllowed"),
    "POST of metadata": ("POST", V2_MODEL, "inference", 405, "MethodNotAllowed"),
    "Triton's repository": ("POST", "/v2/repository/models/damoyolo/load", "inference", 404, "NotFound"),
    "dots in the other protocol": ("POST", "/v2/models/../infer", "inference", 404, "NotFound"),
    "encoded dots in the other protocol": ("POST", "/v2/models/%2e%2e/infer", "inference", 404, "NotFound"),
    "metadata without a token": ("GET", V2_MODEL, None, 401, "NoToken"),
    "dots without a token": ("POST", "/predictions/../models", None, 401, "NoToken"),
    "an unknown model": ("POST", "/predictions/other", "inference", 404, None),
}
# The refusal of a whole body: for its token, for its length.
BODY_REFUSALS = {"wrong": (401, "WrongToken"), "inference": (413, "PayloadTooLarge")}
# The same on the port of operations, which only the host reaches.
OPERATIONS_REFUSALS = {
    "no token": ("GET", "/models", None, 401, "NoToken"),
    "a token of inference on management": ("GET", "/models", "inference", 403, "Forbidden"),
    "a token of inference on metrics": ("GET", "/metrics", "inference", 403, "Forbidden"),
    "an expired token": ("GET", "/models", "expired", 401, "ExpiredToken"),
    "registration by URL": ("POST", f"/models?{EVIL_URL}", "operations", 405, "MethodNotAllowed"),
    "scaling": ("PUT", "/models/damoyolo?min_worker=0", "operations", 405, "MethodNotAllowed"),
    "removal": ("DELETE", "/models/damoyolo", "operations", 405, "MethodNotAllowed"),
    "workflows": ("GET", "/workflows", "operations", 404, "NotFound"),
    "a path with dots": ("GET", "/models/../workflows", "operations", 404, "NotFound"),
    "encoded dots": ("GET", "/models/%2e%2e/workflows", "operations", 404, "NotFound"),
    "an image": ("POST", MODEL, "operations", 404, "NotFound"),
}


@pytest.fixture(scope="module")
def front(server, project_dir, tmp_path_factory):
    with FrontProxy(project_dir, tmp_path_factory.mktemp("front"), server).running() as proxy:
        wait_until(lambda: proxy.request("GET", "/v2/health/ready", token=None)[0] == 200, "readiness", 30.0)
        yield proxy


def require_refusal(answer, status, kind):
    found, headers, body = answer
    error = json.loads(body)
    assert (found, error["code"]) == (status, status)
    if kind is not None:  # HAProxy's own
        assert error["type"] == kind
        assert error["error"] == error["message"]
    assert error["message"]
    assert headers["Content-Type"].startswith("application/json")
    assert not [part for part in INSIDE if part in body]
    assert ("WWW-Authenticate" in headers) == (status == 401)


def test_haproxy_accepts_the_configuration_without_a_warning(project_dir, tmp_path):
    checked = FrontProxy(project_dir, tmp_path, None).check()
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr


def test_an_image_with_a_token_gets_the_servers_own_answer(front, url, smear):
    direct = requests.post(url, data=smear, timeout=60)
    for method, path in (("POST", MODEL), ("PUT", MODEL), ("POST", f"{MODEL}/1.0")):
        status, headers, body = front.request(method, path, smear)
        assert (status, body) == (200, direct.content)
        assert headers["Strict-Transport-Security"]
    text = base64.b64encode(smear).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
    for path, document in (
        (f"{V2_MODEL}/infer", {"inputs": [tensor]}),
        (f"{V2_MODEL}/versions/1.0/infer", {"inputs": [tensor]}),
        ("/v1/models/damoyolo:predict", {"instances": [{"b64": text}]}),
    ):
        sent = json.dumps(document).encode()
        assert front.request("POST", path, sent)[0] == 200
    for path in (
        "/v1/models",
        "/v1/models/damoyolo",
        "/v2",
        V2_MODEL,
        f"{V2_MODEL}/ready",
        f"{V2_MODEL}/versions/1.0/config",
    ):
        assert front.request("GET", path)[0] == 200
    status, _, body = front.request("POST", f"{MODEL}?max_detections=1", smear)
    assert (status, len(json.loads(body)["detections"])) == (200, 1)


def test_detect_takes_the_token_from_the_environment(front, project_dir, monkeypatch, capfd):
    image, ca = project_dir / "tests/data/smears/smear_3.jpg", front.folder / "certificate/ca.pem"
    options = [str(image), "--url", f"https://127.0.0.1:{front.port}", "--ca-file", str(ca)]
    monkeypatch.setenv("DAMOYOLO_TOKEN", front.tokens["inference"])
    assert detect.main(options) == 0
    assert "1 images, 0 failed" in capfd.readouterr().out
    monkeypatch.delenv("DAMOYOLO_TOKEN")
    assert detect.main(options) == 1
    assert "401" in capfd.readouterr().err


def test_what_is_wrong_with_an_image_is_answered_by_the_server(front):
    status, _, body = front.request("POST", MODEL, b"no image")
    assert (status, json.loads(body)["code"]) == (415, 415)


@pytest.mark.parametrize("what", REFUSALS)
def test_the_public_port_refuses(front, what):
    method, path, token, status, kind = REFUSALS[what]
    require_refusal(front.request(method, path, token=token), status, kind)


@pytest.mark.parametrize("what", OPERATIONS_REFUSALS)
def test_the_port_of_operations_refuses(front, what):
    method, path, token, status, kind = OPERATIONS_REFUSALS[what]
    require_refusal(front.request(method, path, token=token, port=front.operations_port), status, kind)


def test_operations_are_read_with_their_token(front):
    for path, part in (("/metrics", b"ts_inference_requests_total"), ("/models/damoyolo", b'"READY"')):
        status, _, body = front.request("GET", path, token="operations", port=front.operations_port)
        assert (status, part in body) == (200, True)


@pytest.mark.parametrize("size", [60_000, 3_000_000, 34_000_001])
def test_a_client_that_sends_its_whole_body_first_reads_the_refusal(front, size):
    connection = http.client.HTTPSConnection("127.0.0.1", front.port, context=front.context, timeout=60)
    token = "wrong" if size < 34_000_000 else "inference"
    with contextlib.closing(connection):
        for _ in range(5):  # the connection goes on, too
            connection.request("POST", MODEL, bytes(size), front.headers(token))
            answer = connection.getresponse()
            require_refusal((answer.status, answer.headers, answer.read()), *BODY_REFUSALS[token])


def test_clients_that_go_on_sending_after_their_refusal_hold_a_hundred_connections(front, smear):
    clients = [
        SlowClient(front.connect(f"127.0.0.{10 + number % 11}"), head(front, "wrong", 1_000_000), b"a")
        for number in range(105)
    ]
    try:
        wait_until(lambda: sum(client.seconds is not None for client in clients) >= 5, "five ends", 20.0)
        wait_until(
            lambda: sum(client.answer.startswith(b"HTTP/1.1 401 ") for client in clients) == 100,
            "refusals",
            20.0,
        )
        assert sum(client.is_alive() for client in clients) == 100
        assert front.request("POST", MODEL, smear)[0] == 200
        assert front.request("GET", MODEL, token="wrong")[0] == 503  # the hundred and first at a time
        assert front.request("GET", "/models", port=front.operations_port)[0] == 403  # counted apart
    finally:
        end(clients)


@pytest.mark.parametrize("operations", [False, True], ids=["public", "operations"])
def test_one_address_holds_ten_of_them(front, operations):
    port = front.operations_port if operations else front.port
    clients = [
        SlowClient(front.connect("127.0.0.30", port=port), head(front, "wrong", 1_000_000), b"a")
        for _ in range(12)
    ]
    try:
        wait_until(lambda: sum(client.seconds is not None for client in clients) == 2, "two ends", 20.0)
        wait_until(lambda: sum(b" 401 " in client.answer[:13] for client in clients) == 10, "refusals", 20.0)
        assert sum(client.is_alive() for client in clients) == 10
        assert front.request("GET", MODEL, token="wrong", port=port)[0] == 401  # from another address
    finally:
        end(clients)


def test_a_client_that_goes_on_sending_after_its_refusal_does_not_keep_a_process(project_dir, tmp_path):
    with FrontProxy(project_dir, tmp_path, None, DAMOYOLO_HARD_STOP="2s").running() as proxy:
        client = SlowClient(proxy.connect(), head(proxy, "wrong", 1_000_000), b"a")
        try:
            wait_until(lambda: client.answer.startswith(b"HTTP/1.1 401 "), "the refusal", 20.0)
            proxy.reload()
            wait_until(lambda: client.seconds is not None, "the end of the old process", 20.0)
        finally:
            end([client])


def end(clients):
    for client in clients:
        client.stopped.set()
    for client in clients:
        client.join(10.0)


def test_another_scheme_of_authorization_is_no_token(front):
    answer = front.request("POST", MODEL, token=None, Authorization="Basic YTpi")
    require_refusal(answer, 401, "NoToken")


def test_a_large_body_is_refused_before_it_is_sent(front):
    with front.connect() as connection:
        head = f"POST {MODEL} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {front.tokens['inference']}\r\n"
        connection.sendall(f"{head}Content-Length: 34000001\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_large_body_of_unknown_length_is_refused(front):
    with front.connect() as connection:
        head = f"POST {MODEL} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {front.tokens['inference']}\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        answer = b""
        with contextlib.suppress(OSError):  # the answer may come before the end, and be lost then
            for _ in range(40):
                connection.sendall(chunk)
            connection.sendall(b"0\r\n\r\n")
        with contextlib.suppress(OSError):
            answer = connection.recv(4096)
        assert answer[:13] in (b"HTTP/1.1 413 ", b"HTTP/1.1 502 ", b"")
    assert front.request("GET", "/v2/health/ready", token=None)[0] == 200


def test_a_damaged_head_is_refused(front):
    with front.connect() as connection:
        connection.sendall(b"POST / HTTP/9.9 x\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_an_endless_head_is_refused(front):
    with front.connect() as connection:
        with contextlib.suppress(OSError):  # refused while it is being sent
            connection.sendall(b"GET / HTTP/1.1\r\nA: " + b"x" * 100_000 + b"\r\n\r\n")
        answer = read_to_end(connection)
    # The end of a connection with bytes unread may cost the answer.
    assert answer.startswith(b"HTTP/1.1 400 ") or not answer


SMUGGLED = b"GET /api-description HTTP/1.1\r\nHost: a\r\n\r\n"
# Requests that end at another place for one reader than for another, with SMUGGLED behind the first end.
DISPUTED = {
    "two lengths": (b"Content-Length: 3\r\nContent-Length: 60\r\n", b"abc"),
    "length and chunks": (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    "chunks that are not the last coding": (b"Transfer-Encoding: chunked, identity\r\n", b"0\r\n\r\n"),
    "another coding": (b"Transfer-Encoding: xchunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n"),
    "a size beyond 32 bits": (b"Transfer-Encoding: chunked\r\n", b"100000004\r\ntest\r\n0\r\n\r\n"),
    "a bare line feed behind a size": (b"Transfer-Encoding: chunked\r\n", b"1;\nx\r\na\r\n0\r\n\r\n"),
    "a quoted line end behind a size": (b"Transfer-Encoding: chunked\r\n", b'1;a="\r\na\r\n0\r\n\r\n'),
}


@pytest.mark.parametrize("what", DISPUTED)
def test_a_request_hidden_in_another_does_not_reach_the_server(front, what):
    headers, body = DISPUTED[what]
    start = f"POST {MODEL} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {front.tokens['inference']}\r\n"
    with front.connect() as connection:
        connection.sendall(start.encode() + headers + b"\r\n" + body + SMUGGLED)
        answer = read_to_end(connection)
    assert b"openapi" not in answer
    # What is read as a second request is one for HAProxy, and has no token.
    statuses = [line[9:12] for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert statuses[0] in (b"400", b"408", b"413", b"415")
    assert set(statuses[1:]) <= {b"401", b"400"}


def test_plain_http_is_closed_without_an_answer(front):
    with front.connect(tls=False) as connection:
        connection.sendall(f"GET {MODEL} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert read_to_end(connection) == b""


def test_the_log_names_the_owner_of_a_token_and_never_the_token(front, smear):
    """HAProxy escapes what is not printable, so a request is one line whatever it holds."""
    front.request("POST", MODEL, smear)
    front.request("POST", "/predictions/x%0a%1b[31mforged", token="wrong")
    wait_until(lambda: "%0a" in front.log.read_text(), "the log", 10.0)
    lines = front.log.read_text().splitlines()
    assert any(f" inference POST {MODEL} 200 " in line for line in lines)
    assert not any(token in line for line in lines for token in front.tokens.values())
    assert not any(line.startswith("forged") for line in lines)


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
def test_old_versions_of_tls_are_refused(front, version):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(front.folder / "certificate/ca.pem")
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match=version):
        context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
    with front.connect(tls=False) as connection, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(connection, server_hostname="127.0.0.1")


def read_to_end(connection):
    received = b""
    try:
        while part := connection.recv(4096):
            received += part
    except OSError:  # reset, or the end of TLS without its farewell
        pass
    return received


def test_one_address_holds_forty_connections(front):
    with contextlib.ExitStack() as stack:
        waiting = []
        for _ in range(45):
            with contextlib.suppress(ConnectionResetError):  # closed before `connect` has returned
                waiting.append(stack.enter_context(front.connect("127.0.0.9", tls=False)))

        def only_forty_are_open():
            readable, _, _ = select.select(waiting, [], [], 0.1)  # nothing is sent, so this is the end
            for each in readable:
                waiting.remove(each)
            return len(waiting) <= 40

        wait_until(only_forty_are_open, "the end of the other five", 5.0)
        assert len(waiting) == 40
        assert front.request("GET", "/v2/health/ready", token=None)[0] == 200


def head(front, token, length):
    return (
        f"POST {MODEL} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {front.tokens[token]}\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


@pytest.mark.slow
def test_slow_clients_are_ended_and_others_served_meanwhile(front, smear):
    slow = {
        "nothing": [SlowClient(front.connect("127.0.0.7", tls=False), b"", b"") for _ in range(20)],
        # The head of a record of 512 bytes.
        "slow handshake": [
            SlowClient(front.connect("127.0.0.2", tls=False), b"\x16\x03\x01\x02\x00\x01", b"\x00")
            for _ in range(20)
        ],
        "slow head": [
            SlowClient(front.connect("127.0.0.3"), b"POST / HTTP/1.1\r\nA: ", b"a") for _ in range(20)
        ],
        "slow body": [
            SlowClient(front.connect("127.0.0.4"), head(front, "slow", len(smear)) + smear[:100], b"a")
            for _ in range(20)
        ],
    }
    flat = [client for clients in slow.values() for client in clients]
    waits, statuses = [], []
    while any(client.is_alive() for client in flat) and len(waits) < 200:
        started = time.monotonic()
        statuses.append(front.request("POST", MODEL, smear)[0])
        waits.append(time.monotonic() - started)
    assert set(statuses) == {200}
    assert max(waits) < PATIENCE_S  # none waited for the end of a slow one
    for what, clients in slow.items():
        seconds = [client.seconds for client in clients]
        assert max(seconds) < PATIENCE_S + 5.0, what
        print(f"{what}: closed after {min(seconds):.1f} to {max(seconds):.1f} s")
    print(f"{len(waits)} good requests meanwhile, the slowest {max(waits):.2f} s")
    assert all(client.answer.startswith(b"HTTP/1.1 408 ") for client in slow["slow head"] + slow["slow body"])


def test_a_token_holds_at_most_32_requests_and_leaves_the_others_to_other_tokens(front, smear):
    # After a second longer than tune.bufsize, so that those accepted have a connection to TorchServe.
    first, drip = head(front, "slow", 10_000_000), bytes(100_000)
    clients = [SlowClient(front.connect(f"127.0.0.{5 + number % 2}"), first, drip) for number in range(40)]
    try:
        wait_until(lambda: sum(bool(client.answer) for client in clients) >= 8, "refusals", 20.0)
        refused = [client.answer for client in clients if client.answer]
        assert len(refused) == 8
        assert all(answer.startswith(b"HTTP/1.1 429 ") for answer in refused)
        assert all(b"\r\nretry-after: 1\r\n" in answer.lower() for answer in refused)
        for _ in range(3):
            assert front.request("POST", MODEL, smear)[0] == 200
        # One of the 32 ends: the place is free, though the refused ones still send.
        assert front.request("POST", MODEL, smear, token="slow")[0] == 429
        end([next(client for client in clients if not client.answer)])
        wait_until(
            lambda: front.request("POST", MODEL, smear, token="slow")[0] == 200, "the place of another", 10.0
        )
        assert sum(client.is_alive() for client in clients) == 39
    finally:
        end(clients)


def test_without_the_server_clients_are_told_to_come_back(project_dir, tmp_path):
    with FrontProxy(project_dir, tmp_path, None).running() as proxy:
        wait_until(lambda: proxy.request("GET", "/v2/health/ready", token=None)[0] == 503, "the check", 20.0)
        for path, token in (("/v2/health/ready", None), (MODEL, "inference")):
            status, headers, body = proxy.request("POST" if token else "GET", path, b"", token)
            assert (status, json.loads(body)["code"], headers["Retry-After"]) == (503, 503, "2")


def test_torchserve_itself_listens_on_this_machine_only(server):
    """Every address of the configuration is 127.0.0.1, so another address of this machine refuses."""
    for url in (server.inference_url, server.management_url, server.metrics_url):
        with pytest.raises(OSError, match=r"refused"):
            socket.create_connection(("127.0.0.8", int(url.rsplit(":", 1)[1])), 5.0).close()
