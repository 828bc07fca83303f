import socket

import pytest

from lib.server.local_http import answers_ok, direct_session
from lib.server.process import describe_model
from lib.server.served_archive import ServedModel

from doubles.stand_in_server import StandInModel

PROXY_VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@pytest.fixture
def proxy(monkeypatch):
    """A proxy in the environment that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for name in PROXY_VARIABLES:
            monkeypatch.setenv(name, address)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield address


def test_local_calls_do_not_go_through_a_proxy(proxy):
    with StandInModel() as model:
        with direct_session() as session:
            assert session.get(f"{model.base_url}/models/m", timeout=10).status_code == 200
        assert describe_model(model.base_url, "m")["batchSize"] == 4
        ServedModel(model.base_url, model.base_url, model.base_url, "m").scale(2, timeout_s=10)


def test_a_server_answers_or_is_not_there():
    with StandInModel() as model:
        assert answers_ok(f"{model.base_url}/models/m")
    assert not answers_ok(f"{model.base_url}/models/m")
