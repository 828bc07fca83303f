"""The client of the management API, against a stand-in."""

import json

import pytest

from lib.cli import ScriptError
from lib.server.management import Management, read_key_file

from doubles.stand_in_server import Reply, StandInServer, failed

PAGE = """# TYPE ts_inference_requests_total counter
ts_inference_requests_total{model_name="m",model_version="1.0",hostname="h",} 3.0
ts_inference_requests_total{model_name="m",model_version="default",hostname="h",} 9.0
ts_inference_requests_total{model_name="other",model_version="1.0",hostname="h",} 5.0
"""


def described(version="1.0", **changes):
    workers = [{"id": "9000", "pid": 11, "status": "READY"}, {"id": "9001", "pid": -1, "status": "UNLOADING"}]
    return {
        "modelVersion": version,
        "modelUrl": "m.mar",
        "minWorkers": 2,
        "batchSize": 8,
        "responseTimeout": 120,
        "workers": workers,
        "jobQueueStatus": {"remainingCapacity": 250, "pendingRequests": 6},
        **changes,
    }


@pytest.fixture
def ask():
    """Asks a stand-in that gives one reply to everything; returns the result and what arrived."""

    def call(reply, method, *arguments, token=None):
        with StandInServer(lambda _: reply) as server:
            url = server.url.removesuffix("/predictions/damoyolo")
            management = Management(url + "/", url, "m", token)
            try:
                return getattr(management, method)(*arguments), server.asked
            finally:
                management.close()

    return call


def test_all_versions_are_read_with_their_workers_and_queue(ask):
    reply = Reply(body=json.dumps([described("1.0"), described("2.0", workers=[])]).encode())
    versions, asked = ask(reply, "versions")
    assert asked[0].path == "/models/m/all"
    assert list(versions) == ["1.0", "2.0"]
    first = versions["1.0"]
    assert (first.archive, first.wanted_workers, first.pending, first.batch_timeout_s) == ("m.mar", 2, 6, 120)
    assert (first.ready_pids, first.has_ready(1), first.has_ready(2)) == ([11], False, False)
    assert versions["2.0"].has_ready(0)


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        ("register", ("m_2.0.mar",), "POST /models?url=m_2.0.mar&synchronous=false"),
        ("scale", ("2.0", 3), "PUT /models/m/2.0?min_worker=3&max_worker=3&synchronous=false"),
        ("set_default", ("2.0",), "PUT /models/m/2.0/set-default"),
        ("unregister", ("1.0",), "DELETE /models/m/1.0"),
    ],
)
def test_a_change_is_one_request_that_does_not_wait_for_workers(ask, method, arguments, expected):
    _, asked = ask(Reply(202), method, *arguments, token="secret")
    assert [f"{each.method} {each.path}" for each in asked] == [expected]
    assert asked[0].headers["Authorization"] == "Bearer secret"


def test_a_refused_change_gives_the_servers_reason_and_the_hint(ask):
    reply = failed(404, "ModelNotFoundException", "Model not found at: m_2.0.mar")
    with pytest.raises(ScriptError, match=r"404 .*Model not found at: m_2\.0\.mar; --model-store has to be"):
        ask(reply, "register", "m_2.0.mar")


def test_registration_is_probed_with_an_archive_that_is_not_there(ask):
    _, asked = ask(failed(404, "ModelNotFoundException", "Model not found"), "require_registration")
    assert asked[0].path == "/models?url=no-such-archive.mar"
    with pytest.raises(ScriptError, match=r"serve\.py --enable-model-api"):
        ask(failed(405, "MethodNotAllowedException", "not allowed"), "require_registration")
    with pytest.raises(ScriptError, match="Token"):
        ask(failed(400, "InvalidKeyException", "Token Authentication failed"), "require_registration")


def test_a_model_that_is_not_served_is_named(ask):
    with pytest.raises(ScriptError, match="no model 'm'"):
        ask(failed(404, "ModelNotFoundException", "Model not found: m"), "versions")


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]", b'[{"modelVersion": "1.0"}]', b"[1]"])
def test_what_is_not_the_management_api_is_said_to_be_none(ask, body):
    with pytest.raises(ScriptError, match="is not TorchServe's management API"):
        ask(Reply(body=body), "version", "1.0")


def test_a_server_that_is_not_there_is_named_with_the_option():
    with pytest.raises(ScriptError, match=r"127\.0\.0\.1:9.*--management-url"):
        Management("http://127.0.0.1:9", "http://127.0.0.1:9", "m").default_version()


@pytest.mark.parametrize(
    ("reply", "card"),
    [
        (Reply(body=b'[{"customizedMetadata": {"worker_pid": 7}}]'), {"worker_pid": 7}),
        (Reply(body=b'[{"customizedMetadata": "none"}]'), {}),
        (Reply(body=b"[{}]"), {}),
        (Reply(body=b"[]"), {}),
        (Reply(500), {}),
        (Reply(drop=True), {}),
    ],
)
def test_the_model_card_is_empty_where_there_is_none(ask, reply, card):
    found, asked = ask(reply, "card", "1.0")
    assert found == card
    assert asked[0].path == "/models/m/1.0?customized=true"


def test_requests_that_name_a_version_are_counted(ask):
    assert ask(Reply(body=PAGE.encode()), "pinned_requests", "1.0")[0] == 3
    assert ask(Reply(body=PAGE.encode()), "pinned_requests", "2.0")[0] == 0
    assert ask(Reply(404), "pinned_requests", "1.0")[0] == 0


def test_the_keys_are_read_from_the_key_file(tmp_path):
    path = tmp_path / "key_file.json"
    keys = {name: {"key": name[:3], "expiration time": "never"} for name in ("management", "inference")}
    path.write_text(json.dumps({**keys, "API": {"key": "x"}}))
    assert read_key_file(path) == ("man", "inf")
    path.write_text("{}")
    with pytest.raises(ScriptError, match=r"key_file\.json"):
        read_key_file(path)
