"""Weights from a file, an address or a name, and the checks on the way."""

import contextlib
import hashlib
import http.server
import ssl
import subprocess
import threading
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import requests
import torch

from lib.cli import ScriptError
from lib.packaging import weights as weights_source
from lib.packaging.weights import fetch_weights, load_source

from damoyolo.errors import CheckpointError
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS

CONTENT = b"weights " * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class FakeResponse:
    """An answer of a web server, as far as the download looks at it."""

    def __init__(self, url, content, length):
        self.url = url
        self.headers = {} if length is None else {"Content-Length": str(length)}
        self._content = content

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing is held."""

    def raise_for_status(self):
        """It is 200."""

    def iter_content(self, size):
        for first in range(0, len(self._content), size):
            yield self._content[first : first + size]


@pytest.fixture
def web(monkeypatch):
    """The next response of the web, and the addresses requested so far."""
    state = {"content": CONTENT, "length": len(CONTENT), "requested": []}

    def get(_session, url, **options):
        assert options["timeout"]
        state["requested"].append(url)
        return FakeResponse(url, state["content"], state["length"])

    monkeypatch.setattr(requests.Session, "get", get)
    return state


def test_a_local_file_is_taken_as_it_is_and_its_sum_is_checked(tmp_path):
    path = tmp_path / "mine.pth"
    path.write_bytes(CONTENT)
    assert fetch_weights(str(path)) == path
    assert fetch_weights(str(path), SHA256.upper()) == path
    with pytest.raises(ScriptError, match=SHA256):
        fetch_weights(str(path), "0" * 64)


def test_an_address_is_downloaded_once(web, tmp_path):
    for _ in range(2):
        path = fetch_weights("https://example.org/a/model.pth", SHA256, tmp_path)
        assert path.name == "model.pth"
        assert path.read_bytes() == CONTENT
    assert web["requested"] == ["https://example.org/a/model.pth"]
    other = fetch_weights("https://example.org/b/model.pth", SHA256, tmp_path)
    assert other != path


def test_an_official_name_becomes_its_address(web, tmp_path):
    path = fetch_weights("damoyolo_tinynasL25_S_477", cache_dir=tmp_path)
    assert path.read_bytes() == CONTENT
    (url,) = web["requested"]
    assert url.startswith("https://")
    assert url.endswith("/damoyolo_tinynasL25_S_477.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content": CONTENT[:-1]}, "7999 of 8000 bytes"),
        ({"content": b"x" * 8000}, "SHA-256"),
    ],
)
def test_a_download_that_went_wrong_leaves_nothing_behind(web, tmp_path, change, message):
    web.update(change)
    with pytest.raises(ScriptError, match=message):
        fetch_weights("https://example.org/model.pth", SHA256, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.fixture
def sites(project_dir, tmp_path, monkeypatch):
    """A site of https and one of http on this machine, which send CONTENT, or redirect to ?to=ADDRESS."""
    script = project_dir / "deploy/production/test_certificate.sh"
    subprocess.run([script, tmp_path / "certificate"], check=True, capture_output=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "certificate/ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate/server.pem")
    with serving(context) as secure, serving(None) as plain:
        yield secure, plain


@contextlib.contextmanager
def serving(context):
    """A site, with the paths that were asked for as its `asked`."""

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            target = parse_qs(urlsplit(self.path).query).get("to")
            self.send_response(302 if target else 200)
            if target:
                self.send_header("Location", target[0])
            self.send_header("Content-Length", str(0 if target else len(CONTENT)))
            self.end_headers()
            self.wfile.write(b"" if target else CONTENT)

        def log_message(self, *_):
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.asked = []
    server.url = f"http{'s' if context else ''}://127.0.0.1:{server.server_port}/model.pth"
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def redirecting(site, target):
    return f"{site.url}?{urlencode({'to': target})}"


def test_a_redirect_to_https_is_followed(sites, tmp_path):
    secure, _ = sites
    path = fetch_weights(redirecting(secure, secure.url), SHA256, tmp_path / "cache")
    assert path.read_bytes() == CONTENT


def test_a_redirect_to_plain_http_is_refused_before_anything_is_asked_there(sites, tmp_path):
    secure, plain = sites
    there_and_back = redirecting(secure, redirecting(plain, secure.url))
    for source in (redirecting(secure, plain.url), there_and_back, redirecting(secure, "file:///etc/passwd")):
        with pytest.raises(ScriptError, match=r"redirects to another scheme; only https .*(http:|file:)"):
            fetch_weights(source, None, tmp_path / "cache")
    assert plain.asked == []
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_certificate_that_nobody_vouches_for_is_refused(sites, tmp_path, monkeypatch):
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    with pytest.raises(ScriptError, match="certificate verify failed"):
        fetch_weights(sites[0].url, None, tmp_path / "cache")


def test_a_cached_file_of_another_sum_is_refused_with_what_to_do(web, tmp_path):
    path = fetch_weights("https://example.org/model.pth", cache_dir=tmp_path)
    with pytest.raises(ScriptError, match=f"delete {path}"):
        fetch_weights("https://example.org/model.pth", "0" * 64, tmp_path)


@pytest.mark.parametrize("source", ["http://example.org/model.pth", "ftp://example.org/model.pth"])
def test_only_https_is_downloaded(web, tmp_path, source):
    with pytest.raises(ScriptError, match="only https"):
        fetch_weights(source, cache_dir=tmp_path)
    assert web["requested"] == []


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ScriptError, match="damoyolo_tinynasL25_S_477"):
        fetch_weights("damoyolo_s", cache_dir=tmp_path)


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DAMOYOLO_CACHE", str(tmp_path))
    assert weights_source.default_cache_dir() == tmp_path
    monkeypatch.delenv("DAMOYOLO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights_source.default_cache_dir() == tmp_path / "damoyolo"


@pytest.fixture
def four_classes(tmp_path):
    """A checkpoint as trained with four class channels."""
    path = tmp_path / "mine.pth"
    torch.save(build_model(VARIANTS["Ns"], 4, folded=False).state_dict(), path)
    return path


@pytest.mark.parametrize("names", [1, 2, 3, 5, 80])
def test_fewer_or_more_names_than_classes_are_refused_with_both_counts(four_classes, names):
    with pytest.raises(CheckpointError, match=f"4 classes, but {names} class names") as caught:
        load_source(four_classes, None, names)
    assert ("--unused-class" in str(caught.value)) == (names == 3)


def test_the_unused_class_of_an_older_head_is_left_out_where_it_is_known(four_classes):
    assert load_source(four_classes, None, 4).num_classes == 4
    assert load_source(four_classes, None, 3, unused_class=True).num_classes == 3
    official = four_classes.with_name("damoyolo_tinynasL25_S_456.pth")
    four_classes.rename(official)
    assert load_source(official, None, 3).num_classes == 3
    with pytest.raises(CheckpointError, match="4 classes, but 2 class names"):
        load_source(official, None, 2)
    with pytest.raises(CheckpointError, match="one name for each class but the last"):
        load_source(official, None, 4, unused_class=True)
