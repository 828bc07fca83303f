"""A real TorchServe answers as its description says, to whatever schemathesis makes of it."""

import subprocess

import requests

TIMEOUT_S = 60.0
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


def test_the_description_is_at_the_port_for_inference_alone(server):
    answer = requests.get(f"{server.inference_url}/openapi.json", timeout=TIMEOUT_S)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.json()["openapi"].startswith("3.1")
    assert requests.head(f"{server.inference_url}/openapi.json", timeout=TIMEOUT_S).status_code == 200
    assert requests.post(f"{server.inference_url}/openapi.json", timeout=TIMEOUT_S).status_code == 405
    assert requests.get(f"{server.management_url}/openapi.json", timeout=TIMEOUT_S).status_code == 404


def test_schemathesis_finds_no_answer_that_is_not_described(server, client_python, tmp_path):
    command = [client_python.with_name("schemathesis"), "run", f"{server.inference_url}/openapi.json"]
    command += ["--checks", ",".join(CHECKS), "--phases", "examples,fuzzing", "--max-examples", "10"]
    command += ["--seed", "1", "--request-timeout", "30", "--continue-on-failure", "--no-color"]
    # It writes a cache into its folder.
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
