"""The page for browsers of a real TorchServe, used in Chromium, directly and behind deploy/production."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import requests

from damoyolo.config import ServingConfig
from damoyolo.page import build_page
from doubles.front_proxy import HAPROXY, FrontProxy
from doubles.real_server import wait_until

TIMEOUT_S = 60.0
CHROMIUM = Path("/usr/bin/chromium")
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
NAME = "<img src=x onerror=alert(1)>"

needs_chromium = pytest.mark.skipif(
    not CHROMIUM.exists(), reason="no /usr/bin/chromium (Debian: apt install chromium)"
)


@pytest.fixture(scope="module")
def browse(client_python, project_dir):
    """Runs tests/clients/browse_page.py; what it prints."""

    def run(*arguments):
        command = [client_python, project_dir / "tests/clients/browse_page.py", *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def visit(browse, server, project_dir):
    """What a browser saw that was sent to the address of the server."""
    return browse("visit", f"{server.inference_url}/", project_dir / "tests/data/smears")


@pytest.fixture(scope="module")
def true_counts(smears):
    return Counter(cell[0] for cell in smears["smear_3"][1])


@needs_chromium
def test_the_address_of_the_server_leads_to_the_page_of_its_model(visit, url):
    assert (visit["status"], visit["url"], visit["title"]) == (200, url, "damoyolo")
    assert visit["headers"]["content-type"] == "text/html; charset=utf-8"
    assert "no-cache" in visit["headers"]["cache-control"]
    assert visit["headers"]["vary"] == "Accept"


@needs_chromium
def test_a_sample_smear_shows_its_true_counts(visit, true_counts):
    image = visit["image"]
    assert image["counts"] == true_counts
    assert image["summary"].startswith("smear_3.jpg: ")
    assert image["canvas"] == image["summary"]
    assert Counter(found["label"] for found in image["answer"]["detections"]) == true_counts
    assert image["latency"].endswith(" ms")


@needs_chromium
def test_a_class_that_is_switched_off_is_not_counted(visit):
    first = next(iter(visit["image"]["counts"]))
    assert first in visit["image"]["summary"]
    assert first not in visit["image"]["without_a_class"]


@needs_chromium
def test_the_score_slider_asks_the_server_again(visit, server, url, smear):
    answer = requests.post(url, data=smear, headers={"X-Detect-Score-Threshold": "0.9"}, timeout=TIMEOUT_S)
    expected = Counter(found["label"] for found in answer.json()["detections"])
    image = visit["image"]
    assert {name: count for name, count in image["above_0.9"].items() if count} == expected
    assert sum(expected.values()) < sum(image["counts"].values())
    assert image["redrawn"]
    assert "X-Detect-Score-Threshold: 0.9" in image["curl_above_0.9"]


@needs_chromium
def test_the_curl_line_beside_the_image_gets_the_same_answer(visit, project_dir):
    assert visit["image"]["copied_curl"] == visit["image"]["curl_above_0.9"].replace("0.9", "0.25")
    done = subprocess.run(
        ["bash", "-c", visit["image"]["copied_curl"]],
        cwd=project_dir / "tests/data/smears",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert json.loads(done.stdout) == json.loads(visit["image"]["copied_json"])


@needs_chromium
def test_several_images_are_stepped_through_with_the_arrow_keys(visit):
    assert visit["several"]["thumbnails"] == 3
    assert visit["several"]["steps"] == ["smear_7.jpg", "smear_3.jpg", "smear_7.jpg"]


@needs_chromium
def test_an_error_is_shown_as_the_server_says_it(visit, url):
    refused = requests.post(url, data=b"no image", timeout=TIMEOUT_S)
    assert visit["several"]["message_of_text"] == f"{refused.status_code}: {refused.json()['message']}"
    assert not visit["several"]["error_after_paste"]
    assert visit["several"]["after_clear"] == "No image yet."


@needs_chromium
def test_every_control_is_reached_and_used_with_the_keyboard(visit):
    keyboard = visit["keyboard"]
    controls = ["choose", "camera", "clear", "previous", "next", "thumbnails", "classes", "score_threshold"]
    controls += ["iou_threshold", "copy_curl", "curl", "copy_json", "json"]
    assert keyboard["order"] == controls
    assert keyboard["switched_off"] != visit["image"]["summary"]
    before, after, position = keyboard["slider"]
    assert float(after) > float(before)
    assert position == "1 of 3"  # the arrow belonged to the slider
    assert keyboard["unnamed"] == []


@needs_chromium
def test_the_webcam_sends_one_frame_at_a_time_until_it_is_stopped(visit):
    camera = visit["camera"]
    assert camera["button"] == "Stop webcam"
    assert camera["requests"] >= 2
    assert (camera["most_at_a_time"], camera["after_stop"]) == (1, 0)


@needs_chromium
def test_the_page_fits_a_small_window_and_follows_the_colour_scheme(visit):
    assert visit["small"]["width"] <= 400
    assert visit["small"]["canvas"] <= 400
    assert len(set(visit["small"]["colours"])) == 2


@needs_chromium
def test_the_page_asks_no_other_server_and_breaks_no_policy(visit, server):
    assert visit["origins"] == [server.inference_url]
    # The one error on the way: a text file was answered with 415, which Chromium logs.
    assert [text for text in visit["complaints"] if "415" not in text] == []


@needs_chromium
def test_a_class_named_like_html_is_text(browse, tmp_path):
    page = build_page(ServingConfig(class_names=(NAME, "</script><script>alert(2)</script>")))
    (tmp_path / "page.html").write_bytes(page.body)
    (tmp_path / "headers.json").write_text(json.dumps(dict(page.headers)))
    shown = browse("names", tmp_path / "page.html", tmp_path / "headers.json", NAME)
    assert shown["counts"][NAME] == 1
    assert shown["summary"] == f"{NAME}: 1 {NAME}"
    assert shown["elements"] == 1  # its own script
    assert shown["complaints"] == []
    assert len(shown["requests"]) == 2


def test_clients_that_are_no_browsers_get_json_as_before(server, url):
    for accept in ("*/*", "application/json", "image/png"):
        answer = requests.get(url, headers={"Accept": accept}, timeout=TIMEOUT_S)
        assert (answer.status_code, answer.json()["type"]) == (400, "MissingImage")
    start = requests.get(f"{server.inference_url}/", timeout=TIMEOUT_S)
    assert (start.status_code, start.json()["type"]) == (405, "MethodNotAllowedException")
    assert requests.options(f"{server.inference_url}/", timeout=TIMEOUT_S).status_code == 200
    unknown = requests.get(f"{server.inference_url}/predictions/other", headers=HTML, timeout=TIMEOUT_S)
    assert unknown.status_code == 404


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_page_comes_with_its_headers_for_every_version(url, method):
    for address in (url, f"{url}/1.0"):
        answer = requests.request(method, address, headers=HTML, timeout=TIMEOUT_S)
        assert answer.status_code == 200
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.text.startswith("<!doctype html>") == (method == "GET")


def test_other_ports_have_no_page(server):
    answer = requests.get(f"{server.management_url}/", headers=HTML, timeout=TIMEOUT_S)
    assert answer.status_code == 405


@pytest.fixture
def front(server, project_dir, tmp_path):
    with FrontProxy(project_dir, tmp_path, server, DAMOYOLO_PAGE="1").running() as proxy:
        wait_until(lambda: proxy.request("GET", "/v2/health/ready", token=None)[0] == 200, "readiness", 30.0)
        yield proxy


@needs_chromium
@pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed (Debian: apt install haproxy)")
def test_behind_the_front_the_page_asks_for_the_token(browse, front, project_dir, true_counts):
    image = project_dir / "tests/data/smears/smear_3.jpg"
    address = f"https://127.0.0.1:{front.port}/predictions/damoyolo"
    shown = browse("enter", address, image, front.tokens["inference"])
    assert shown["status"] == 200
    assert shown["refusal"] == "401: send the header Authorization: Bearer TOKEN"
    assert shown["counts"] == true_counts
    assert shown["stored"] == [0, 0, 0]
    assert not shown["asked_again"]
    assert front.tokens["inference"] not in shown["curl"]


@pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed (Debian: apt install haproxy)")
def test_the_front_lets_nothing_but_the_page_through_without_a_token(front):
    model = "/predictions/damoyolo"

    def status(method, path, port=None, **headers):
        return front.request(method, path, token=None, port=port, **headers)[0]

    assert status("GET", model, **HTML) == 200
    assert status("GET", f"{model}?a=b", **HTML) == 200
    assert status("GET", model) == 401
    # With a body, which need not be sent to be refused.
    assert status("GET", model, **HTML, **{"Content-Length": "9"}) == 401
    assert status("GET", model, **HTML, **{"Transfer-Encoding": "chunked"}) == 401
    assert status("POST", model, **HTML) == 401
    assert status("GET", model, describe="True", **HTML) == 401
    assert status("GET", "/models", **HTML) == 401
    assert status("GET", model, port=front.operations_port, **HTML) == 401
