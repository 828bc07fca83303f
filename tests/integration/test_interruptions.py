"""The commands that send images, while the server's worker is killed and while the server is restarted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import torch

from lib.packaging.builder import ArchiveRequest, build_archive

from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS
from doubles.real_server import config_with_free_ports, ports_in_use, wait_until

IMAGES = 300


class Serving:
    """scripts/serve.py with a small model, always at the same ports."""

    def __init__(self, project_dir, folder):
        self.project_dir = project_dir
        self.folder = folder
        self.config, self.addresses = config_with_free_ports(project_dir, folder)
        self.url = f"{self.addresses[0]}/predictions/damoyolo"
        self.ready_file = folder / "ready"

    def start(self):
        self.ready_file.unlink(missing_ok=True)
        command = [sys.executable, "scripts/serve.py", "--ts-config", str(self.config)]
        command += ["--model-store", str(self.folder), "--ready-file", str(self.ready_file)]
        with (self.folder / "output.txt").open("a") as output:
            self.process = subprocess.Popen(
                command, cwd=self.project_dir, stdout=output, stderr=subprocess.STDOUT
            )
        wait_until(self.is_ready, "the server being ready")

    def is_ready(self):
        assert self.process.poll() is None, (self.folder / "output.txt").read_text()
        return self.ready_file.exists() and bool(self.ready_file.read_text())

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)

    def kill_worker(self):
        model = requests.get(f"{self.addresses[1]}/models/damoyolo", timeout=60).json()[0]
        os.kill(model["workers"][0]["pid"], signal.SIGKILL)

    def restart(self):
        self.stop()
        assert not ports_in_use(self.addresses)
        self.start()


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
            model_settings={"batchSize": 4},
            serving={"backend": "pytorch", "input_size_hw": [192, 192]},
        )
    )
    serving = Serving(project_dir, folder)
    serving.start()
    try:
        yield serving
    finally:
        serving.stop()
        assert not ports_in_use(serving.addresses)


@pytest.fixture(scope="module")
def images(smear, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        (folder / f"{number:03}.jpg").write_bytes(smear)
    return folder


def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [Serving.kill_worker, Serving.restart])
def test_every_image_is_answered_once_whatever_happens_to_the_server(
    serving, images, project_dir, tmp_path, disturb
):
    found = tmp_path / "found.jsonl"
    command = [sys.executable, "scripts/detect.py", str(images), "--url", serving.url, "--jsonl", str(found)]
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
