"""What serve.py says and returns when its server is of no more use."""

from types import SimpleNamespace

import pytest

from lib.server.process import ports_from

import serve

REASON = "a model has lost all its workers for good"


class Lines(list):
    """In place of a stream."""

    print = list.append


@pytest.fixture
def server():
    """A server without models, of which serve.py learns only why the wait ended."""
    nothing = {name: lambda *_: None for name in ("start", "wait_until_ready")}
    urls = {f"{name}_url": "http://127.0.0.1:9" for name in ("inference", "management", "metrics")}
    return SimpleNamespace(**nothing, **urls, model_names=list, wait=lambda: REASON)


def test_a_lost_model_is_one_line_of_stderr_and_code_1(server):
    out, err = Lines(), Lines()
    assert serve._serve(server, SimpleNamespace(timeout=1.0, ready_file=None), out, err) == 1
    assert err == [f"serve: {REASON}"]


def test_one_port_gives_all_five_and_keeps_the_hosts():
    properties = {
        "inference_address": "http://0.0.0.0:8080",
        "management_address": "http://127.0.0.1:8081",
        "metrics_address": "http://[::1]:8082",
    }
    assert ports_from(9000, properties) == {
        "inference_address": "http://0.0.0.0:9000",
        "management_address": "http://127.0.0.1:9001",
        "metrics_address": "http://[::1]:9002",
        "grpc_inference_port": "9003",
        "grpc_management_port": "9004",
    }


@pytest.mark.parametrize("port", ["80", "65532", "x", "-1"])
def test_a_port_without_room_for_the_others_is_a_usage_error(port, capsys):
    with pytest.raises(SystemExit) as exit_info:
        serve.main(["--port", port])
    assert exit_info.value.code == 2
    assert "accepted is a" in capsys.readouterr().err


def test_the_logs_go_where_the_option_says(monkeypatch, tmp_path):
    started = {}

    class Server:
        def __init__(self, *_, log_dir, **__):
            started["log_dir"] = log_dir

        def stop(self):
            return True

    monkeypatch.setattr("lib.server.process.TorchServeProcess", Server)
    monkeypatch.setattr(serve, "_serve", lambda *_: 0)
    for options, folder in (([], serve.PROJECT_DIR / "logs"), (["--log-dir", str(tmp_path)], tmp_path)):
        assert serve._run_server(serve._parser().parse_args(options), Lines(), Lines()) == 0
        assert started["log_dir"] == folder
