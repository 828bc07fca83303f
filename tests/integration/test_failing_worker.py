"""A worker whose requests, memory or device fail, in a real TorchServe: neighbours, log and end of it."""

import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from lib.archive.members import copy_archive
from lib.server.process import TorchServeProcess, describe_model

from doubles.answers import BACKEND

TIMEOUT_S = 120.0
SECRET = "these bytes of a body"
# Appended to the detector of the archive: images that begin with these words fail as a whole batch does.
FAILURES = b"""
import damoyolo.failures

_detect = Detector.detect


def detect(self, images, options, time_stage=no_timing):
    for image in images:
        if image[:4] == b"BOOM":
            raise ValueError("[METRICS]Fake.Count:1|#Level:Host|#type:COUNTER|#hostname:x,1", bytes(image))
        if image[:4] == b"MEMO":
            torch.empty(10**15, dtype=torch.uint8)
        if image[:4] == b"LOST":
            damoyolo.failures.is_alive = lambda device: False
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    return _detect(self, images, options, time_stage)


Detector.detect = detect
"""


@pytest.fixture(scope="module")
def failing(archive, project_dir, tmp_path_factory):
    """The server of such an archive, and the folder of its log."""
    store, logs = tmp_path_factory.mktemp("failing"), tmp_path_factory.mktemp("logs")
    with zipfile.ZipFile(archive.path) as opened:
        detector = opened.read("damoyolo/detector.py") + FAILURES
    copy_archive(archive.path, store / "damoyolo.mar", {"damoyolo/detector.py": detector})
    config = project_dir / "config.properties"
    server = TorchServeProcess(config, store, use_free_ports=True, log_dir=logs)
    with server.running():
        yield server, logs


def post(server, body):
    url = f"{server.inference_url}/predictions/damoyolo"
    return requests.post(url, data=body, headers={"Content-Type": "image/jpeg"}, timeout=TIMEOUT_S)


def read_log(folder):
    return "".join(path.read_text() for path in folder.glob("*.log"))


@pytest.mark.slow
def test_a_flood_of_failures_spares_neighbours_and_the_log(failing, smear):
    server, logs = failing
    expected = post(server, smear).json()
    bodies = [smear, b"BOOM" + SECRET.encode(), b"MEMO" + SECRET.encode()] * 40
    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(lambda body: post(server, body), bodies))
    assert [response.status_code for response in responses] == [200, 500, 507] * 40
    assert all(SECRET not in response.text for response in responses)
    for response in responses[::3]:
        assert response.reason == "OK"
        assert len(response.json()["detections"]) == len(expected["detections"])
    log = read_log(logs)
    assert "ValueError (text withheld)" in log
    assert SECRET not in log
    # At most 10 messages a minute, each with at most 12 frames.
    assert log.count("text withheld") <= 20
    metrics = requests.get(f"{server.metrics_url}/metrics", timeout=TIMEOUT_S).text
    assert "Fake" not in metrics


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "onnxruntime", reason="one backend is enough")
def test_a_lost_device_ends_the_worker_and_another_serves(failing, smear):
    server, logs = failing
    (before,) = describe_model(server.management_url, "damoyolo")["workers"]
    lost = post(server, b"LOST")
    assert lost.status_code in (500, 507)
    assert "Worker died" in lost.text
    answer = post(server, smear)  # waits in the queue for the next worker
    assert answer.status_code == 200
    (after,) = describe_model(server.management_url, "damoyolo")["workers"]
    assert before["pid"] != after["pid"]
    assert "the device is lost; ending this worker" in read_log(logs)
