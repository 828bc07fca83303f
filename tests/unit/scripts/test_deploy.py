"""The command line of deploy.py, against a stand-in for the management API."""

import json

import pytest

from lib.deploy.store import ArchiveStore, Record

import deploy
from doubles.stand_in_server import Reply, StandInServer, failed


def described(version, workers, archive):
    return {
        "modelVersion": version,
        "modelUrl": archive,
        "minWorkers": 2,
        "batchSize": 8,
        "responseTimeout": 120,
        "workers": [{"id": str(pid), "pid": pid, "status": "READY"} for pid in range(workers)],
        "jobQueueStatus": {"pendingRequests": 4},
    }


def management_answer(asked):
    """Version 1.0 is the default, 2.0 starts; nothing can be registered."""
    if asked.method != "GET":
        return failed(405, "MethodNotAllowedException", "not allowed")
    versions = [described("1.0", 2, "m.mar"), described("2.0", 1, "m_2.0.mar")]
    return Reply(body=json.dumps(versions if asked.path.endswith("/all") else versions[:1]).encode())


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command against the stand-in: exit code, output, errors, and the requests it got."""

    def call(*arguments):
        with StandInServer(management_answer) as server:
            url = server.url.removesuffix("/predictions/damoyolo")
            addresses = ["--management-url", url, "--metrics-url", url, "--model", "m"]
            code = deploy.main([*arguments, *addresses, "--model-store", str(tmp_path)])
        return code, *capsys.readouterr(), server.asked

    return call


def test_status_shows_versions_workers_and_what_is_unfinished(run, tmp_path):
    code, output, _, _ = run("status")
    assert (code, output.splitlines()) == (
        0,
        [
            "m 1.0 (default): 2 of 2 workers ready, 4 requests waiting, from m.mar",
            "m 2.0: 1 of 2 workers ready, 4 requests waiting, from m_2.0.mar",
            "rollback serves version (none)",
        ],
    )
    ArchiveStore(tmp_path, "m").write_record(Record(previous="0.9", adding="2.0", replacing="1.0"))
    _, output, _, _ = run("status")
    assert "rollback serves version 0.9" in output
    assert "unfinished: version 2.0 in place of 1.0" in output


def test_without_the_model_api_an_update_says_how_to_allow_it(run, tmp_path):
    code, _, errors, asked = run("scale", "1")
    assert code == 1
    assert "serve.py --enable-model-api" in errors
    assert [each.method for each in asked if each.method != "GET"] == ["POST"]


@pytest.mark.parametrize("arguments", [[], ["scale", "0"], ["scale"], ["update"], ["status", "3"]])
def test_a_wrong_command_line_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        deploy.main(arguments)
    assert raised.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_folder_without_golden_images_is_named(run, tmp_path):
    code, _, errors, _ = run("scale", "1", "--golden", str(tmp_path))
    assert (code, "--golden is" in errors) == (1, True)
