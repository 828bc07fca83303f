"""What deploy/front-end makes of requests, answers and errors between the client and the handler."""

import base64
import contextlib
import http.client
import json
import socket
import subprocess
import threading
import time
import urllib.request
from urllib.parse import urlsplit

import grpc
import pytest
import requests

from lib.server.process import TorchServeProcess

from doubles.echo_handler import write_echo_archive
from doubles.grpc_client import call, predictions_request, register_model

TIMEOUT_S = 60.0
PICTURE = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00 " + bytes(range(256)) * 8
SECRET = b"bytes-of-a-body"
# Little, so that memory that is not released is missed soon; Netty's buffers may take as much again.
HEAP_MB = 256
LOG_ARGUMENT = "-Dlog4j.configurationFile=deploy/log4j2.xml"


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def echo(project_dir, tmp_path_factory, log_dir):
    """A server whose handler answers what reached it."""
    store = tmp_path_factory.mktemp("store")
    write_echo_archive(store / "echo.mar", "echo")
    server = TorchServeProcess(
        project_dir / "config.properties",
        store,
        overrides={"load_models": "echo.mar", "vmargs": f"-Xmx{HEAP_MB}m {LOG_ARGUMENT}"},
        use_free_ports=True,
        log_dir=log_dir,
    )
    with server.running(120.0):
        yield server


@pytest.fixture
def url(echo):
    return f"{echo.inference_url}/predictions/echo"


def received(text):
    """The fields and headers that reached the handler."""
    answer = json.loads(text)
    fields = {name: base64.b64decode(value) for name, value in answer["fields"].items()}
    return fields, answer["headers"]


def curl(*arguments):
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, check=True, timeout=70).stdout


def exchange(url, content, wait_s=TIMEOUT_S):
    """What the server answers to these bytes until it closes the connection."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=wait_s) as connection:
        connection.sendall(content)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.decode().split("\r\n"), body


def post(path, content_type, body):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


@pytest.mark.parametrize("form", ["--data-binary", "-T", "-F", "-d"])
def test_curl_sends_a_picture_in_every_form(url, tmp_path, form):
    file = tmp_path / "picture.jpg"
    # -d removes line breaks and NUL, as documented.
    file.write_bytes(PICTURE if form != "-d" else b"\xff\xd8\xff\xe0" + bytes(range(14, 256)))
    argument = {"-T": str(file), "-F": f"data=@{file}"}.get(form, f"@{file}")
    fields, _ = received(curl(url, form, argument))
    assert fields == {"data" if form == "-F" else "body": file.read_bytes()}


def test_urllib_sends_a_picture(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, PICTURE, timeout=TIMEOUT_S) as response:
        fields, headers = received(response.read())
    assert fields == {"body": PICTURE}
    assert headers["content-type"] == "application/octet-stream"


def test_json_that_is_declared_as_a_form_is_json(url):
    document = b' \n{"image": "aGk=", "note": "a&b=c"}'
    fields, headers = received(curl(url, "--data-binary", document.decode()))
    assert fields == {"body": document}
    assert headers["content-type"] == "application/json"


def test_a_form_remains_a_form(url):
    fields, _ = received(curl(url, "-d", "score_threshold=0.5&image=a%2Bb+c&classes=Gr%C3%B6%C3%9Fe&empty="))
    assert fields == {
        "score_threshold": b"0.5",
        "image": b"a+b c",
        "classes": "Größe".encode(),
        "empty": b"",
    }


def test_a_wrong_multipart_type_does_not_hide_a_picture(url):
    headers = {"Content-Type": "multipart/form-data"}
    fields, _ = received(requests.post(url, data=PICTURE, headers=headers, timeout=TIMEOUT_S).text)
    assert fields == {"body": PICTURE}


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("end", [b"--b--", b"--b"])
def test_multipart_may_have_either_line_end_and_its_boundary_in_the_picture(url, line_end, end):
    picture = PICTURE * 8 + b"--b--" + b" --b\r\n" * 200 + b"\n-\n--"
    disposition = b'Content-Disposition: form-data; name="data"; filename="multipart/a.jpg"'
    lines = [b"", b"--b", disposition, b"Content-Type: image/jpeg", b"", picture]
    lines += [b"--b", b'Content-Disposition: form-data; name="classes"', b"", b"1", end, b""]
    body = line_end.join(lines) if end == b"--b--" else line_end.join(lines[:-1])
    _, answer = exchange(url, post(urlsplit(url).path, MULTIPART, body))
    assert received(answer)[0] == {"data": picture, "classes": b"1"}


def test_the_query_string_reaches_the_handler_as_headers(url):
    query = {"score_threshold": "0.5", "classes": "Größe,1"}
    headers = {"x-detect-score-threshold": "0.1"}
    for address in (url, f"{url}/1.0", url.replace("predictions/echo", "v1/models/echo:predict")):
        response = requests.post(address, params=query, headers=headers, data=PICTURE, timeout=TIMEOUT_S)
        fields, found = received(response.text)
        assert fields == {"body": PICTURE}
        assert (found["x-detect-score-threshold"], found["x-detect-classes"]) == ("0.5", "Größe,1")


PART = b'--b\r\nContent-Disposition: form-data; name="a"'
FORM, MULTIPART = "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"
END = b"\r\n\r\n" + SECRET + b"\r\n--b--\r\n"
CLIENT_ERRORS = {
    "part without a name": (MULTIPART, b"--b\r\nContent-Disposition: form-data" + END),
    "part with a file name only": (MULTIPART, b'--b\r\nContent-Disposition: form-data; filename="a"' + END),
    "unknown charset": (MULTIPART, PART + b"\r\nContent-Type: text/plain; charset=x" + END),
    "disposition without a value": (MULTIPART, PART + b"; x" + END),
    "multipart in multipart": (MULTIPART, PART + b"\r\nContent-Type: multipart/mixed; boundary=c" + END),
    "multipart in multipart, behind blanks": (
        MULTIPART,
        PART + b"\r\n \r\n\r\n\xe2\x80\x83content-TYPE :\x01multipart/mixed; boundary=c" + END,
    ),
    "multipart in multipart, with line feeds": (
        MULTIPART,
        b"\n " + PART.replace(b"\r", b"") + b"\nContent-Type: multipart/mixed" + END,
    ),
    "line that begins with the delimiter": (MULTIPART, PART + b"\r\n\r\n\r\n--bc" + END),
    "long part header": (MULTIPART, PART + b"\r\nX: " + bytes(9000) + END),
    "long part header, with line feeds": (MULTIPART, PART + b"\nX: y" * 2000 + b"\n\n" + SECRET),
    "many parts": (MULTIPART, (PART + b"\r\n\r\n\r\n") * 101 + PART + END),
    "no boundary": ("multipart/form-data", PART + END),
    "empty boundary": ("multipart/form-data; boundary=", PART + END),
    "boundary of other characters": ('multipart/form-data; boundary="\x7f"', PART + END),
    "long boundary": (f"multipart/form-data; boundary={'b' * 71}", PART + END),
    "percent sign in a form": (FORM, b"a=%zz" + SECRET),
    "many fields": (FORM, b"a=1&" * 101 + SECRET),
    "many fields without a value": (FORM, b"a&" * 8_000_000 + SECRET),
}


@pytest.mark.parametrize("name", CLIENT_ERRORS)
def test_a_body_that_cannot_be_decoded_gets_400_without_bytes_of_it(url, name):
    content_type, body = CLIENT_ERRORS[name]
    path = urlsplit(url).path
    head, answer = exchange(url, post(path, content_type, body))
    assert head[0] == "HTTP/1.1 400 Bad Request"
    error = json.loads(answer)
    assert (error["code"], error["type"]) == (400, "BadRequestException")
    assert len(error["message"]) < 250
    assert SECRET not in answer


@pytest.mark.slow
def test_large_bodies_that_cannot_be_decoded_leave_no_memory_behind(url):
    megabyte = bytes(1 << 20)
    body = b"--b\r\nContent-Disposition: form-data\r\n\r\n" + 30 * megabyte + b"\r\n--b--\r\n"
    for _ in range(2 * HEAP_MB // 30):
        response = requests.post(url, data=body, headers={"Content-Type": MULTIPART}, timeout=TIMEOUT_S)
        assert response.status_code == 400
    picture = PICTURE + 8 * megabyte
    fields, _ = received(requests.post(url, files={"data": picture}, timeout=TIMEOUT_S).text)
    assert fields == {"data": picture}


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/predictions/%zz", 400),
        ("/predictions/echo?a=%zz", 400),
        ("/predictions/echo?a=%0d%0aX:%20y", 400),
        ("/predictions/echo?a%20b=1", 400),
        ("/predictions/" + "a" * 5000, 400),
        ("/predictions/other", 404),
        ("*", 404),
    ],
)
def test_an_address_that_means_nothing_gets_4xx(url, target, status):
    head, answer = exchange(url, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert head[0].split()[1] == str(status)
    assert json.loads(answer)["code"] == status


def test_a_body_over_the_limit_gets_413_with_an_explanation(url):
    head = "POST /predictions/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 34000001"
    lines, answer = exchange(url, f"{head}\r\n\r\n".encode())
    assert lines[0].startswith("HTTP/1.1 413 ")
    assert "max_request_size" in json.loads(answer)["message"]


@pytest.mark.parametrize(
    "request_line_and_headers",
    ["GET /ping HTTP/1.0\r\n", "GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"],
)
def test_the_connection_is_closed_where_the_client_wants_that(url, request_line_and_headers):
    lines, answer = exchange(url, f"{request_line_and_headers}\r\n".encode())
    assert lines[0] == "HTTP/1.1 200 OK"
    assert "connection: close" in lines
    assert json.loads(answer)["status"] == "Healthy"


def test_the_connection_is_kept_otherwise(url):
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    sockets = set()
    with contextlib.closing(connection):
        for _ in range(3):
            connection.request("POST", parts.path, PICTURE)
            assert connection.getresponse().read()
            sockets.add(connection.sock)
    assert len(sockets) == 1


@pytest.mark.parametrize(
    ("status", "reason"), [(200, "OK"), (415, "Unsupported Media Type"), (507, "Insufficient Storage")]
)
def test_an_empty_reason_is_filled_in(url, status, reason):
    response = requests.post(url, data={"status": str(status)}, timeout=TIMEOUT_S)
    assert (response.status_code, response.reason) == (status, reason)


def grpc_port(echo):
    return int(echo.properties["grpc_inference_port"])


@pytest.mark.parametrize("method", ["Predictions", "StreamPredictions"])
def test_grpc_answers_and_passes_metadata_as_options(echo, method):
    request = predictions_request("echo", {"data": PICTURE})
    metadata = [("x-detect-score-threshold", "0.5"), ("x-other", "1")]
    for _ in range(3):
        (answer,) = call(grpc_port(echo), method, request, metadata)
        fields, headers = received(answer)
        assert fields == {"data": PICTURE}
        assert headers == {"x-detect-score-threshold": "0.5"} | {
            name: value for name, value in headers.items() if not name.startswith("x-")
        }


GRPC_ERRORS = [
    ("echo", b"400", grpc.StatusCode.INVALID_ARGUMENT),
    ("echo", b"413", grpc.StatusCode.INVALID_ARGUMENT),
    ("echo", b"500", grpc.StatusCode.INTERNAL),
    ("echo", b"503", grpc.StatusCode.RESOURCE_EXHAUSTED),
    ("echo", b"507", grpc.StatusCode.RESOURCE_EXHAUSTED),
    ("other", b"200", grpc.StatusCode.NOT_FOUND),
    ("", b"200", grpc.StatusCode.INVALID_ARGUMENT),
]


@pytest.mark.parametrize("method", ["Predictions", "StreamPredictions"])
@pytest.mark.parametrize(("model", "status", "code"), GRPC_ERRORS)
def test_grpc_reports_errors_as_status(echo, method, model, status, code):
    with pytest.raises(grpc.RpcError) as raised:
        call(grpc_port(echo), method, predictions_request(model, {"status": status}))
    assert raised.value.code() is code
    if model == "echo":
        assert raised.value.details() == f"status {status.decode()}"


@pytest.mark.parametrize("body", [b'{"message": null}', b'{"message": {}}', b"null", b"[]", b"{", b""])
def test_grpc_reports_an_error_body_without_a_message(echo, body):
    with pytest.raises(grpc.RpcError) as raised:
        call(grpc_port(echo), "Predictions", predictions_request("echo", {"status": b"415", "error": body}))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (answer,) = call(grpc_port(echo), "Predictions", predictions_request("echo", {"data": PICTURE}))
    assert received(answer)[0] == {"data": PICTURE}


def test_grpc_refuses_streams_of_requests_without_harm(echo):
    with pytest.raises(grpc.RpcError) as raised:
        call(grpc_port(echo), "StreamPredictions2", predictions_request("echo", {"data": PICTURE}))
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


REGISTRATIONS = [
    {"url": "/etc"},
    {"url": "../echo.mar"},
    {"url": "https://example.com/echo.mar"},
    {"url": "file:///dev/null"},
    {"model_name": "other"},
    {"url": "echo.mar", "handler": "os:system"},
    {"url": "echo.mar", "model_name": "../echo"},
    {"url": "echo.mar\n"},
]


@pytest.mark.parametrize("parameters", REGISTRATIONS)
def test_only_archives_of_the_model_store_can_be_registered(echo, parameters):
    address = f"{echo.management_url}/models"
    for sent in ({"params": parameters}, {"json": parameters}):
        answer = requests.post(address, timeout=TIMEOUT_S, **sent)
        assert (answer.status_code, answer.json()["type"]) == (400, "BadRequestException")
        assert "example.com" not in answer.text
    with pytest.raises(grpc.RpcError) as raised:
        register_model(int(echo.properties["grpc_management_port"]), **parameters)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_registering_an_archive_of_the_model_store_is_left_to_torchserve(echo):
    address = f"{echo.management_url}/models"
    for sent in ({"params": {"url": "echo.mar"}}, {"json": {"url": "echo.mar"}}):
        # The server of this module has no model API.
        assert requests.post(address, timeout=TIMEOUT_S, **sent).status_code == 405
    with pytest.raises(grpc.RpcError) as raised:
        register_model(int(echo.properties["grpc_management_port"]), url="echo.mar")
    assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("body", ["null", "{", "[]", '"url"'])
def test_a_registration_that_is_no_json_object_gets_400(echo, body):
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{echo.management_url}/models", data=body, headers=headers, timeout=TIMEOUT_S)
    assert answer.status_code == 400


def test_the_worker_outlives_streams_beside_http_requests(echo, url):
    pid = requests.get(f"{echo.management_url}/models/echo", timeout=TIMEOUT_S).json()[0]["workers"][0]["pid"]
    statuses = []

    def post_some():
        statuses.extend(requests.post(url, data=PICTURE, timeout=TIMEOUT_S).status_code for _ in range(20))

    sender = threading.Thread(target=post_some)
    sender.start()
    for _ in range(20):
        call(grpc_port(echo), "StreamPredictions", predictions_request("echo", {"data": PICTURE}))
    sender.join()
    assert statuses == [200] * 20
    description = requests.get(f"{echo.management_url}/models/echo", timeout=TIMEOUT_S).json()[0]
    assert [worker["pid"] for worker in description["workers"]] == [pid]


def test_a_flood_of_bad_requests_leaves_next_to_nothing_in_log_and_output(echo, url, log_dir):
    printed, logged = len(echo.last_output()), (log_dir / "torchserve.log").stat().st_size
    path = urlsplit(url).path
    for content_type, body in CLIENT_ERRORS.values():
        for _ in range(20):
            exchange(url, post(path, content_type, body[:20_000]))
    for _ in range(50):  # HTTP on the port of gRPC, broken TLS, and clients that go away
        parts = urlsplit(url)
        for port in (grpc_port(echo), parts.port):
            with socket.create_connection((parts.hostname, port), timeout=TIMEOUT_S) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + SECRET)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    time.sleep(1.0)  # what is still to be written
    log = (log_dir / "torchserve.log").read_bytes()
    assert SECRET not in log
    assert SECRET.decode() not in echo.last_output()
    # Room for a few lines of a server that is busy, not for one per request.
    assert len(echo.last_output()) - printed < 5_000
    assert len(log) - logged < 5_000


def test_a_worker_that_prints_without_end_does_not_fill_log_and_output(echo, url, log_dir):
    assert requests.post(url, data={"lines": "20000"}, timeout=TIMEOUT_S).status_code == 200
    time.sleep(2.0)  # what is still to be written
    log = (log_dir / "torchserve.log").read_text().splitlines()
    # 2000 at once and 20 per second (deploy/log4j2.xml); the test takes no minute.
    assert 1000 < len(log) < 2000 + 60 * 20
