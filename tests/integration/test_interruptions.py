"""The commands that send images, while the server's worker is killed and while the server is restarted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib.packaging.builder import ArchiveRequest, build_archive

from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS
from doubles.real_server import wait_until
from doubles.served_command import ServedCommand
from doubles.steady_load import SteadyLoad

IMAGES = 300


# Of a batch, in seconds; this network needs milliseconds for it.
RESPONSE_TIMEOUT_S = 5
BATCH_SIZE = 4
CLIENTS = 8


def kill_worker(serving):
    os.kill(serving.worker_pid(), signal.SIGKILL)


def stop_worker(serving):
    """As a worker that hangs, say in a driver: nothing but SIGKILL ends it."""
    os.kill(serving.worker_pid(), signal.SIGSTOP)


def restart(serving):
    assert serving.stop() == 0
    serving.start()


@pytest.fixture(scope="module")
def serving(project_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    torch.manual_seed(0)
    torch.save(build_model(VARIANTS["Ns"], 2, folded=False).state_dict(), folder / "weights.pth")
    build_archive(
        ArchiveRequest(
            weights=str(folder / "weights.pth"),
            class_names=("a", "b"),
            output_dir=folder,
            model_settings={"batchSize": BATCH_SIZE, "responseTimeout": RESPONSE_TIMEOUT_S},
            serving={"backend": "pytorch", "input_size_hw": [192, 192]},
        )
    )
    serving = ServedCommand(project_dir, folder)
    serving.start()
    try:
        yield serving
    finally:
        serving.stop()


@pytest.fixture(scope="module")
def images(smear, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        (folder / f"{number:03}.jpg").write_bytes(smear)
    return folder


def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [kill_worker, stop_worker, restart])
def test_every_image_is_answered_once_whatever_happens_to_the_server(
    serving, images, project_dir, tmp_path, disturb
):
    found = tmp_path / "found.jsonl"
    command = [
        sys.executable,
        "scripts/detect.py",
        str(images),
        "--url",
        serving.addresses[0],
        "--output",
        str(found),
    ]
    detect = subprocess.Popen(
        command, cwd=project_dir, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(lines_of(found)) > 40 or detect.poll() is not None, "the first answers")
    assert detect.poll() is None
    disturb(serving)
    _, err = detect.communicate(timeout=400)
    rows = list(map(json.loads, lines_of(found)))
    assert detect.returncode == 0, err
    assert [Path(row["image"]).name for row in rows] == [f"{number:03}.jpg" for number in range(IMAGES)]
    assert all("detections" in row for row in rows)
    assert "requests were sent again" in err


@pytest.mark.slow
@pytest.mark.parametrize(("disturb", "limit_s"), [(kill_worker, 0), (stop_worker, RESPONSE_TIMEOUT_S)])
def test_a_client_without_retries_loses_at_most_what_the_worker_had(serving, smear, disturb, limit_s):
    with SteadyLoad(serving.url, smear, CLIENTS) as load:
        wait_until(lambda: load.answered() > 40, "the first answers")
        load.mark()
        disturb(serving)
        # TorchServe waits twice as long before each further attempt to start a worker.
        wait_until(load.is_served_again, "answers of the next worker", limit_s + 60.0)
    lost = load.lost()
    print(f"{disturb.__name__}: {load.figures()}")
    # The batch in computation, and jobs that a worker had taken for the next one.
    assert len(lost) <= 2 * BATCH_SIZE
    assert set(lost) <= {500, 503, 507}
