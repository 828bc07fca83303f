"""The client against a stand-in server."""

import gzip
import json
import socket
import threading
import time
from itertools import count

import numpy as np
import pytest

import damoyolo_client
from damoyolo_client.answers import MAX_ANSWER_BYTES, NoAnswerError, ServerAnswerError, as_arrays
from damoyolo_client.client import Client, RequestOptions
from damoyolo_client.errors import ClientError
from damoyolo_client.retry import MAX_LOSSES
from doubles.stand_in_server import Reply, StandInServer, failed, found

CELL = {"class_id": 1, "label": "RBC", "score": 0.9, "bbox": [1.0, 2.0, 3.0, 4.0]}


def cell_named(asked):
    """A detection whose label is the image's bytes."""
    return found({**CELL, "label": asked.body.decode()})


def free_url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_the_image_travels_as_it_is_and_the_answer_comes_back():
    image = bytes(range(256))
    with StandInServer(lambda asked: found(CELL)) as server, Client(server.base_url) as client:
        assert client.detect(image) == {"width": 640, "height": 480, "detections": [CELL]}
    assert server.asked[0].body == image
    assert server.asked[0].path == "/predictions/damoyolo"


def test_the_model_is_named_in_the_path_below_any_prefix():
    with StandInServer(lambda asked: found()) as server:
        for url, model in ((f"{server.base_url}/", "m"), (f"{server.base_url}/behind/a/proxy", "a/b ?")):
            with Client(url, model) as client:
                client.detect(b"image")
    assert [asked.path for asked in server.asked] == [
        "/predictions/m",
        "/behind/a/proxy/predictions/a%2Fb%20%3F",
    ]


def test_a_token_is_sent_with_each_request_and_with_no_other():
    with StandInServer(lambda asked: found()) as server:
        for token in ("aZ09-._~+/=", None):
            with Client(server.base_url, token=token) as client:
                client.detect(b"image")
    assert [asked.headers.get("Authorization") for asked in server.asked] == ["Bearer aZ09-._~+/=", None]


@pytest.mark.parametrize("token", ["", "two words", "line end\n", "\r\nX-Detect-Format: jpeg", "naïve"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(token):
    with pytest.raises(ClientError, match="the token has characters") as refused:
        Client(token=token)
    assert not token or token not in str(refused.value)


def test_a_certificate_authority_that_is_not_a_file_is_named(tmp_path):
    with pytest.raises(ClientError, match=r"missing\.pem', which is not a file"):
        Client(ca_file=tmp_path / "missing.pem")


def test_a_certificate_authority_without_a_certificate_ends_the_request_at_once(tmp_path):
    authority = tmp_path / "ca.pem"
    authority.write_text("text")
    with StandInServer(lambda asked: found()) as server:
        url = server.base_url.replace("http", "https")
        with Client(url, ca_file=authority) as client, pytest.raises(ClientError, match="certificate"):
            client.detect(b"image")
        assert not client.repeated


def test_answers_become_arrays():
    second = {**CELL, "class_id": 0, "label": "WBC", "score": 0.5}
    with StandInServer(lambda asked: found(CELL, second)) as server, Client(server.base_url) as client:
        arrays = as_arrays(client.detect(np.zeros((4, 6, 3), np.uint8)))
    assert server.asked[0].body.startswith(b"\x89PNG")
    assert arrays.boxes_xyxy.tolist() == [CELL["bbox"]] * 2
    assert arrays.scores.tolist() == pytest.approx([0.9, 0.5])
    assert arrays.class_ids.tolist() == [1, 0]
    assert arrays.labels == ("RBC", "WBC")
    assert as_arrays({"detections": []}).boxes_xyxy.shape == (0, 4)


def test_what_the_package_names_is_there():
    assert damoyolo_client.Client is Client
    assert all(getattr(damoyolo_client, name) for name in damoyolo_client.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        damoyolo_client.Nothing  # noqa: B018 (the look-up is the test)


@pytest.mark.parametrize("name", ["Blutzelle ß", "two\nlines", "one,two"])
def test_a_class_name_that_no_header_can_carry_is_refused_by_name(name):
    with pytest.raises(ClientError, match="class id instead"):
        RequestOptions(classes=("RBC", name)).headers()


def test_one_connection_serves_request_after_request():
    with StandInServer(lambda asked: found()) as server, Client(server.base_url) as client:
        for _ in range(5):
            client.detect(b"image")
    assert len(server.connections) == 1


def test_an_error_answer_keeps_status_type_and_message():
    with (
        StandInServer(lambda asked: failed(415, "UnsupportedImage", "no image")) as server,
        Client(server.base_url) as client,
        pytest.raises(ServerAnswerError, match="415 UnsupportedImage: no image") as caught,
    ):
        client.detect(b"text")
    assert (caught.value.status, caught.value.kind, caught.value.message) == (
        415,
        "UnsupportedImage",
        "no image",
    )
    assert len(server.asked) == 1


def test_a_413_without_words_names_the_setting():
    with (
        StandInServer(lambda asked: Reply(413)) as server,
        Client(server.base_url) as client,
        pytest.raises(ServerAnswerError, match="max_request_size"),
    ):
        client.detect(b"large")


def sized(detection):
    return b'{"width": 4, "height": 3, "detections": [%b]}' % detection


@pytest.mark.parametrize(
    "body",
    [
        b"<html>hello</html>",
        b"[1, 2]",
        b'{"prediction": 3}',
        b"",
        sized(b"3"),
        sized(b'{"label": {}, "class_id": 0, "score": 1, "bbox": [1, 2, 3, 4]}'),
        sized(b'{"label": "a", "class_id": 0, "score": NaN, "bbox": [1, 2, 3, 4]}'),
        sized(b'{"label": "a", "class_id": 0, "score": 1, "bbox": [1, 2, 3]}'),
        sized(b'{"label": "a", "class_id": 0, "score": 1, "bbox": [1, 2, 3, 1e999]}'),
        sized(b'{"label": "a", "class_id": -1, "score": 1, "bbox": [1, 2, 3, 4]}'),
        b'{"detections": []}',
        b'{"width": 4, "detections": []}',
        b'{"width": 4, "height": 0, "detections": []}',
        b'{"width": 4, "height": "3", "detections": []}',
        b"[" * 1_000_000,
    ],
)
def test_a_200_that_is_no_detection_result_is_an_error(body):
    with (
        StandInServer(lambda asked: Reply(body=body)) as server,
        Client(server.base_url) as client,
        pytest.raises(ServerAnswerError, match="is no result"),
    ):
        client.detect(b"image")


def test_an_image_is_sent_again_until_the_queue_has_room():
    counter = count()

    def full_twice(asked):
        return failed(503, "ServiceUnavailableException", "no worker") if next(counter) < 2 else found(CELL)

    with StandInServer(full_twice) as server, Client(server.base_url, pause_s=0.01) as client:
        assert client.detect(b"image")["detections"] == [CELL]
    assert [asked.body for asked in server.asked] == [b"image"] * 3


def test_a_queue_that_stays_full_is_given_up_after_the_total_time():
    with (
        StandInServer(lambda asked: failed(503, "ServiceUnavailableException", "no worker")) as server,
        Client(server.base_url, retry_s=0.5, pause_s=0.01) as client,
    ):
        start_s = time.monotonic()
        with pytest.raises(ServerAnswerError, match=r"503 ServiceUnavailableException: .*attempt \d+"):
            client.detect(b"image")
        assert time.monotonic() - start_s >= 0.5
        first = len(server.asked)
        assert client.repeated == first - 1 > 1
        # The server has answered nobody for that time: the next image gets one attempt.
        with pytest.raises(ServerAnswerError, match="503"):
            client.detect(b"image")
        assert len(server.asked) == first + 1


def test_an_outage_is_forgotten_after_a_pause_longer_than_the_retry_time():
    with (
        StandInServer(lambda asked: failed(503, "ServiceUnavailableException", "no worker")) as server,
        Client(server.base_url, retry_s=0.3, pause_s=0.01) as client,
    ):
        for pause_s, attempts in ((0.0, range(2, 100)), (0.0, (1,)), (0.4, range(2, 100))):
            time.sleep(pause_s)
            before = len(server.asked)
            with pytest.raises(ServerAnswerError, match="503"):
                client.detect(b"image")
            assert len(server.asked) - before in attempts


def silent_until(release):
    """Answers nobody before the event."""

    def answer(_asked):
        release.wait(20)
        return found()

    return answer


def test_an_outage_lasts_while_requests_wait_for_a_silent_server():
    """A request that is under way for longer than the retry time is no pause."""
    release = threading.Event()

    with (
        StandInServer(silent_until(release)) as server,
        Client(server.base_url, timeout_s=0.5, retry_s=0.3, pause_s=0.01) as client,
    ):
        attempts = []
        for _ in range(3):
            with pytest.raises(NoAnswerError) as caught:
                client.detect(b"image")
            attempts.append(caught.value.attempts)
        release.set()
    assert attempts == [2, 1, 1]


def test_a_failure_without_an_answer_does_not_end_an_outage():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Client(f"https://127.0.0.1:{port}/", retry_s=1.0, pause_s=0.01) as client:
        with pytest.raises(NoAnswerError, match=r"no server .*attempt \d+"):
            client.detect(b"image")

        def answer_without_tls():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 400 no TLS here\r\n\r\n")

        with socket.create_server(("127.0.0.1", port)) as listener:
            thread = threading.Thread(target=answer_without_tls)
            thread.start()
            with pytest.raises(NoAnswerError, match="cannot send"):
                client.detect(b"image")
            thread.join()
        with pytest.raises(NoAnswerError, match="no server") as caught:
            client.detect(b"image")
        assert caught.value.attempts == 1


def zipped(body):
    return Reply(body=gzip.compress(body, 1), headers={"Content-Encoding": "gzip"})


@pytest.mark.parametrize("form", [lambda body: Reply(body=body), zipped])
@pytest.mark.parametrize("call", [Client.detect, Client.draw])
def test_an_answer_without_end_is_not_read_to_its_end(form, call):
    reply = form(bytes(MAX_ANSWER_BYTES + 1))
    with (
        StandInServer(lambda asked: reply) as server,
        Client(server.base_url) as client,
        pytest.raises(ServerAnswerError, match="larger than 67,108,864 bytes"),
    ):
        call(client, b"image")
    assert len(server.asked) == 1


def test_after_an_answer_that_is_too_large_the_client_goes_on():
    counter = count()
    large = Reply(body=bytes(MAX_ANSWER_BYTES + 1))
    with (
        StandInServer(lambda asked: large if next(counter) == 0 else found(CELL)) as server,
        Client(server.base_url) as client,
    ):
        first, second = client.detect_many([b"image"] * 2, in_flight=1)
    assert isinstance(first.error, ServerAnswerError)
    assert second.answer["detections"] == [CELL]


def test_a_drawn_image_of_the_largest_size_arrives_whole():
    body = bytes(range(256)) * (MAX_ANSWER_BYTES // 256)
    with StandInServer(lambda asked: Reply(body=body)) as server, Client(server.base_url) as client:
        assert client.draw(b"image") == body


def test_a_compressed_answer_is_decompressed():
    body = json.dumps({"width": 1, "height": 1, "detections": [CELL]}).encode()
    with StandInServer(lambda asked: zipped(body)) as server, Client(server.base_url) as client:
        assert client.detect(b"image")["detections"] == [CELL]


def test_a_compressed_answer_that_is_damaged_is_an_error_of_the_server():
    with (
        StandInServer(lambda asked: Reply(body=b"text", headers={"Content-Encoding": "gzip"})) as server,
        Client(server.base_url) as client,
        pytest.raises(ServerAnswerError, match="cannot be decompressed"),
    ):
        client.detect(b"image")
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [500, 507])
def test_an_image_whose_worker_died_is_sent_again(status):
    counter = count()
    died = failed(status, "InternalServerException", "Worker died.")
    with (
        StandInServer(lambda asked: died if next(counter) == 0 else found(CELL)) as server,
        Client(server.base_url, pause_s=0.001) as client,
    ):
        assert client.detect(b"image")["detections"] == [CELL]


def test_an_image_that_ends_every_worker_is_given_up():
    with (
        StandInServer(lambda asked: failed(500, "InternalServerException", "Worker died.")) as server,
        Client(server.base_url, pause_s=0.001) as client,
        pytest.raises(ServerAnswerError, match=r"Worker died\. \(attempt 6\)"),
    ):
        client.detect(b"image")
    assert len(server.asked) == MAX_LOSSES == 6


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (400, "InvalidOption", "score"),
        (404, "ModelNotFoundException", "m"),
        (413, "ImageTooLarge", "large"),
        (500, "InternalError", "the server failed"),
        (507, "OutOfMemory", "too little memory"),
    ],
)
def test_a_refusal_that_stays_is_not_retried(status, kind, message):
    with (
        StandInServer(lambda asked: failed(status, kind, message)) as server,
        Client(server.base_url, pause_s=0.001) as client,
        pytest.raises(ServerAnswerError, match=kind),
    ):
        client.detect(b"image")
    assert len(server.asked) == 1


def test_a_server_that_starts_again_at_the_same_port_loses_no_image():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    images = [str(number).encode() for number in range(40)]

    def slow(asked):
        time.sleep(0.05)
        return cell_named(asked)

    with Client(f"http://127.0.0.1:{port}", pause_s=0.01) as client:
        with StandInServer(slow, port):
            outcomes = client.detect_many(images, in_flight=4)
            answered = [next(outcomes) for _ in range(3)]
        time.sleep(0.2)
        with StandInServer(cell_named, port) as second:
            answered += outcomes
    labels = [outcome.answer["detections"][0]["label"] for outcome in answered if outcome.answer]
    assert labels == [str(number) for number in range(40)]
    assert second.asked
    assert client.repeated > 0


def test_abandoned_requests_do_not_hold_up_the_end():
    release = threading.Event()

    def silent_but_for_the_first(asked):
        if asked.body != b"0":
            release.wait(20)
        return found()

    images = [str(number).encode() for number in range(40)]
    with StandInServer(silent_but_for_the_first) as server, Client(server.base_url) as client:
        outcomes = client.detect_many(images, in_flight=4)
        next(outcomes)
        start_s = time.monotonic()
        outcomes.close()
        assert time.monotonic() - start_s < 5
        release.set()


@pytest.mark.parametrize("sent_before", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
def test_a_dropped_connection_is_tried_again(sent_before):
    counter, dropped = count(), Reply(drop=True, body=sent_before)
    with (
        StandInServer(lambda asked: dropped if next(counter) == 0 else found(CELL)) as server,
        Client(server.base_url, pause_s=0.001) as client,
    ):
        assert client.detect(b"image")["detections"] == [CELL]


def test_a_server_that_always_drops_the_connection_is_given_up():
    with (
        StandInServer(lambda asked: Reply(drop=True)) as server,
        Client(server.base_url, pause_s=0.001) as client,
        pytest.raises(ClientError, match=r"dropped the connection .*\(attempt 6\)"),
    ):
        client.detect(b"image")
    assert len(server.asked) == 6


def test_after_silence_an_image_is_sent_again():
    release, counter = threading.Event(), count()

    def silent_once(asked):
        if next(counter) == 0:
            release.wait(20)
        return found(CELL)

    with StandInServer(silent_once) as server, Client(server.base_url, timeout_s=0.5) as client:
        assert client.detect(b"image")["detections"] == [CELL]
        release.set()
    assert len(server.asked) == 2


def test_silence_ends_at_the_time_limit_and_without_retries_at_once():
    release = threading.Event()

    with (
        StandInServer(silent_until(release)) as server,
        Client(server.base_url, timeout_s=0.2, retry_s=0) as client,
    ):
        start_s = time.monotonic()
        with pytest.raises(ClientError, match=r"within 0\.2 s"):
            client.detect(b"image")
        release.set()
    assert time.monotonic() - start_s < 5
    assert len(server.asked) == 1


def test_an_answer_that_stops_half_way_ends_at_the_time_limit_too():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_half():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
                finished.wait(20)

        finished = threading.Event()
        thread = threading.Thread(target=answer_half)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with (
            Client(url, timeout_s=0.2, retry_s=0) as client,
            pytest.raises(ClientError, match=r"within 0\.2 s"),
        ):
            client.detect(b"image")
        finished.set()
        thread.join()


def test_a_redirect_is_not_followed():
    with StandInServer(lambda asked: found()) as elsewhere:
        there = Reply(307, headers={"Location": elsewhere.url})
        with (
            StandInServer(lambda asked: there) as server,
            Client(server.base_url) as client,
            pytest.raises(ServerAnswerError, match="not followed") as caught,
        ):
            client.detect(b"private image")
        assert elsewhere.url in str(caught.value)
        assert elsewhere.asked == []


def test_a_proxy_of_the_environment_does_not_see_the_images(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, free_url())
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with StandInServer(lambda asked: found(CELL)) as server, Client(server.base_url) as client:
        assert client.detect(b"image")["detections"] == [CELL]


def test_an_absent_server_is_named_with_what_to_start():
    client = Client(free_url(), retry_s=0)
    for call in (client.require_server, lambda: client.detect(b"image")):
        with pytest.raises(ClientError, match=r"scripts/serve\.py"):
            call()


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8080/predictions/damoyolo",
        "ftp://host/x",
        "http://",
        "",
        "http://h:port/",
        "http://h:8080/predictions/damoyolo",
        "http://h:8080?model=damoyolo",
        "http://[::1/",
        "http://h/a b",
        "http://h/\n",
        "http://h/\x1b[2J",
    ],
)
def test_an_address_without_scheme_or_host_is_refused(url):
    with pytest.raises(ClientError, match="accepted is http"):
        Client(url)


def test_many_images_are_in_flight_at_once_but_no_more_than_requested():
    together = threading.Barrier(4)

    def meet(asked):
        together.wait(10)  # breaks, and with it the answer, unless four requests are here at once
        return found()

    with StandInServer(meet) as server, Client(server.base_url) as client:
        outcomes = list(client.detect_many([b"image"] * 12, in_flight=4))
    assert [outcome.error for outcome in outcomes] == [None] * 12
    assert server.most_at_once == len(server.connections) == 4


def test_answers_keep_the_order_of_the_images_however_they_come():
    def first_is_last(asked):
        time.sleep(0.2 if asked.body == b"0" else 0.0)
        return cell_named(asked)

    images = [str(number).encode() for number in range(20)]
    with StandInServer(first_is_last) as server, Client(server.base_url) as client:
        outcomes = list(client.detect_many(images, in_flight=4))
    labels = [outcome.answer["detections"][0]["label"] for outcome in outcomes if outcome.answer]
    assert labels == [str(number) for number in range(20)]
    assert [outcome.index for outcome in outcomes] == list(range(20))


def test_a_bad_image_costs_only_itself(tmp_path):
    good = tmp_path / "good.jpg"
    good.write_bytes(b"good")

    def answer_by_content(asked):
        return failed(422, "CorruptImage", "cut off") if asked.body == b"bad" else cell_named(asked)

    with StandInServer(answer_by_content) as server, Client(server.base_url) as client:
        outcomes = list(client.detect_many([good, b"bad", tmp_path / "missing.jpg", b"fine"]))
    assert [outcome.answer is not None for outcome in outcomes] == [True, False, False, True]
    assert isinstance(outcomes[1].error, ServerAnswerError)
    assert isinstance(outcomes[2].error, FileNotFoundError)


def test_images_are_taken_from_the_source_only_as_they_are_sent():
    taken = count()

    def endless():
        while True:
            next(taken)
            yield b"image"

    with StandInServer(lambda asked: found()) as server, Client(server.base_url) as client:
        outcomes = client.detect_many(endless(), in_flight=2)
        for _ in range(5):
            next(outcomes)
        outcomes.close()
    assert next(taken) <= 5 + 4 * 2


def test_no_images_give_no_outcomes():
    assert list(Client(free_url()).detect_many([])) == []
