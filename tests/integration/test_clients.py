"""Ordinary clients, each as its users write it: all get the same answer from a real TorchServe."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import urllib.request

import aiohttp
import httpx
import pytest
import requests

TIMEOUT_S = 120
REQUESTS = 12  # of a load generator


@pytest.fixture(scope="module")
def image_file(smear, tmp_path_factory):
    path = tmp_path_factory.mktemp("client") / "smear.jpg"
    path.write_bytes(smear)
    return path


@pytest.fixture(scope="module")
def json_file(smear, image_file):
    path = image_file.with_suffix(".json")
    path.write_text(json.dumps({"image": base64.b64encode(smear).decode()}))
    return path


@pytest.fixture(scope="module")
def expected(url, smear):
    """The answer to the sample image, sent in the plainest way."""
    response = requests.post(
        url, data=smear, headers={"Content-Type": "application/octet-stream"}, timeout=TIMEOUT_S
    )
    assert response.status_code == 200
    return response.json()


def installed(program):
    return pytest.param(program, marks=pytest.mark.skipif(not shutil.which(program), reason=f"no {program}"))


def run(*command):
    """What a program prints; it must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CURL_FORMS = {
    "-T": "-T {image}",
    "--data-binary": "--data-binary @{image}",
    "-X POST --data-binary": "-X POST --data-binary @{image}",
    "--data-binary with the image's type": "--data-binary @{image} -H Content-Type:image/jpeg",
    "--data-binary with options": "--data-binary @{image} -H X-Detect-Max-Detections:1000",
    "-F data": "-F data=@{image}",
    "-F image and an option": "-F image=@{image} -F max_detections=1000",
    "-d of JSON": "-d @{json}",
    "-d of JSON with its type": "-d @{json} -H Content-Type:application/json",
    "--http1.0": "--http1.0 --data-binary @{image}",
    "without Expect": "--data-binary @{image} -H Expect:",
    "chunked": "--data-binary @{image} -H Transfer-Encoding:chunked",
}


@pytest.mark.parametrize("form", CURL_FORMS.values(), ids=CURL_FORMS)
def test_curl_gets_the_answer_in_every_form(url, image_file, json_file, expected, form):
    arguments = [part.format(image=image_file, json=json_file) for part in form.split()]
    output = run("curl", "--silent", "--show-error", "--include", "--max-time", TIMEOUT_S, url, *arguments)
    head, _, body = output.rpartition("\n\n")
    # `Expect: 100-continue` brings a status line of its own before the last one.
    assert re.findall(r"^HTTP/1\.[01] .*", head, re.M)[-1].split(maxsplit=1)[1].strip() == "200 OK"
    assert json.loads(body) == expected


def with_requests(url, image):
    response = requests.post(url, data=image, timeout=TIMEOUT_S)
    return response.status_code, response.reason, response.json()


def with_requests_and_a_file(url, image):
    response = requests.post(url, files={"data": image}, timeout=TIMEOUT_S)
    return response.status_code, response.reason, response.json()


def with_httpx(url, image):
    response = httpx.post(url, content=image, timeout=TIMEOUT_S, trust_env=False)
    return response.status_code, response.reason_phrase, response.json()


def with_aiohttp(url, image):
    async def post():
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url, data=image) as response,
        ):
            return response.status, response.reason, await response.json()

    return asyncio.run(post())


def with_urllib(url, image):
    """Sends Content-Type: application/x-www-form-urlencoded, as curl --data-binary does."""
    with urllib.request.urlopen(url, data=image, timeout=TIMEOUT_S) as response:
        return response.status, response.reason, json.load(response)


@pytest.mark.parametrize(
    "client", [with_requests, with_requests_and_a_file, with_httpx, with_aiohttp, with_urllib]
)
def test_a_python_client_gets_the_answer_without_saying_what_it_sends(url, smear, expected, client):
    assert client(url, smear) == (200, "OK", expected)


@pytest.mark.parametrize("node", [installed("node")])
def test_fetch_in_node_gets_the_answer(url, image_file, expected, node):
    script = """
        const [url, path] = process.argv.slice(1);
        const body = require("fs").readFileSync(path);
        fetch(url, {method: "POST", body, signal: AbortSignal.timeout(100000)}).then(async response =>
            console.log(JSON.stringify([response.status, response.statusText, await response.json()])));
    """
    assert json.loads(run(node, "-e", script, url, image_file)) == [200, "OK", expected]


@pytest.mark.parametrize("ab", [installed("ab")])
def test_apache_bench_counts_no_failure(url, image_file, ab):
    report = run(
        ab, "-k", "-q", "-s", "60", "-n", REQUESTS, "-c", 4, "-p", image_file, "-T", "image/jpeg", url
    )
    assert re.search(rf"Complete requests:\s+{REQUESTS}\b", report), report
    assert re.search(r"Failed requests:\s+0\b", report), report
    assert "Non-2xx" not in report
    assert re.search(rf"Keep-Alive requests:\s+{REQUESTS}\b", report), report


@pytest.mark.parametrize("h2load", [installed("h2load")])
def test_h2load_counts_every_answer_as_done(url, image_file, h2load):
    report = run(h2load, "--h1", "-n", REQUESTS, "-c", 4, "-d", image_file, url)
    assert f"{REQUESTS} done, {REQUESTS} succeeded, 0 failed, 0 errored" in report, report
    assert f"status codes: {REQUESTS} 2xx" in report, report


@pytest.mark.parametrize("wrk", [installed("wrk")])
def test_wrk_counts_no_error(url, image_file, tmp_path, wrk):
    script = tmp_path / "post.lua"
    script.write_text(
        f'local file = io.open("{image_file}", "rb")\nwrk.method = "POST"\nwrk.body = file:read("*a")\n'
    )
    report = run(wrk, "-t", 1, "-c", 4, "-d", "3s", "--timeout", "60s", "-s", script, url)
    assert int(re.search(r"(\d+) requests in", report)[1]) > 0, report
    assert "Non-2xx" not in report
    assert "Socket errors" not in report
