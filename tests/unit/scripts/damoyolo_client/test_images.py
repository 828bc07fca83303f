"""What the client takes as an image, and what it downloads."""

import io
import socket
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


def test_a_download_that_trickles_ends_in_time(monkeypatch):
    monkeypatch.setattr(images, "DOWNLOAD_S", 0.3)
    stopped = threading.Event()

    def trickle(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not stopped.wait(0.05):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener,), daemon=True)
        thread.start()
        start_s = time.monotonic()
        with pytest.raises(ClientError, match="takes longer"):
            encoded(f"http://127.0.0.1:{listener.getsockname()[1]}/slow.jpg")
        assert time.monotonic() - start_s < 20
        stopped.set()
        thread.join(10)


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
