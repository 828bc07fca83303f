"""What the client takes as an image, and what it downloads."""

import contextlib
import io
import socket
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from damoyolo_client import images
from damoyolo_client.errors import ClientError
from damoyolo_client.images import encoded
from doubles.stand_in_server import Reply, StandInServer


def test_bytes_paths_and_names_of_files_are_sent_as_they_are(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"image")
    assert encoded(b"image") == encoded(tmp_path / "a.jpg") == encoded(str(tmp_path / "a.jpg")) == b"image"


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 6)])
def test_an_array_is_sent_without_loss(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with Image.open(io.BytesIO(encoded(pixels))) as image:
        assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 6, 3)), np.zeros((3, 4, 6), np.uint8), np.zeros((0, 6, 3), np.uint8), 3, None]
)
def test_another_array_is_refused_with_what_is_accepted(pixels):
    with pytest.raises(ClientError, match="accepted are uint8 arrays"):
        encoded(pixels)


def test_a_download_has_a_limit(monkeypatch):
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 1000)
    with (
        StandInServer(lambda asked: Reply(body=bytes(1001))) as server,
        pytest.raises(ClientError, match="more than 1,000 bytes"),
    ):
        encoded(server.base_url)


@contextlib.contextmanager
def raw_server(head, piece, pause_s=0.0):
    """The address of a server that answers `head`, then `piece` again and again; and what it was asked."""
    stopped, asked = threading.Event(), []

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            asked.append(connection.recv(10_000))
            connection.sendall(head)
            while not stopped.wait(pause_s):
                connection.sendall(piece)
                asked.append(len(piece))

    def serve(listener):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/image.jpg", asked
        stopped.set()
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",
    ],
    ids=["body", "header", "chunk head"],
)
def test_a_download_that_trickles_ends_in_time(monkeypatch, head):
    monkeypatch.setattr(images, "DOWNLOAD_S", 0.3)
    with raw_server(head, b"x", pause_s=0.05) as (address, _):
        start_s = time.monotonic()
        with pytest.raises(ClientError, match="takes longer"):
            encoded(address)
        assert time.monotonic() - start_s < 20


def test_the_body_of_a_redirect_is_not_read():
    head = b"HTTP/1.1 302 Found\r\nLocation: /next\r\n\r\n"
    with (
        raw_server(head, bytes(2**20)) as (address, asked),
        pytest.raises(ClientError, match="more than 5 redirects"),
    ):
        encoded(address)
    requests = [each for each in asked if isinstance(each, bytes)]
    assert len(requests) == images.MAX_REDIRECTS + 1
    # What the buffers of a few connections hold.
    assert sum(each for each in asked if isinstance(each, int)) < 200 * 2**20


def test_a_redirect_is_followed_within_its_site_and_to_another():
    with StandInServer(lambda asked: Reply(body=b"image")) as other:

        def answer(asked):
            target = "there" if asked.path == "/a/here" else f"{other.base_url}/x"
            return Reply(302, headers={"Location": target})

        with StandInServer(answer) as server:
            assert encoded(f"{server.base_url}/a/here") == b"image"
    assert [asked.path for asked in server.asked] == ["/a/here", "/a/there"]


def test_a_redirect_from_https_to_http_is_refused():
    assert images._redirect_target("https://a/b", "c") == "https://a/c"
    assert images._redirect_target("http://a/b", "https://c") == "https://c"
    with pytest.raises(ValueError, match="http://a/c, which is not followed"):
        images._redirect_target("HTTPS://a/b", "http://a/c")


def test_a_download_uses_neither_a_proxy_nor_passwords_of_the_environment(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with StandInServer(lambda asked: Reply(body=b"image")) as server:
        assert encoded(server.base_url) == b"image"
    assert "Authorization" not in server.asked[0].headers


def test_standard_input_has_the_limit_of_a_download(monkeypatch):
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 1000)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(1001))))
    with pytest.raises(ClientError, match="more than 1,000 bytes"):
        images.find_sources(["-"], recursive=False)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/x.jpg", "http://[::1/x.jpg", "http:///x.jpg", "https://127.0.0.1:port/"]
)
def test_an_address_that_gives_nothing_is_named(address):
    with pytest.raises(ClientError, match=r"cannot download http"):
        encoded(address)


def test_a_download_that_leads_to_a_file_is_refused():
    there = Reply(302, headers={"Location": "file:///etc/passwd"})
    with (
        StandInServer(lambda asked: there) as server,
        pytest.raises(ClientError, match="cannot download"),
    ):
        encoded(server.base_url)
