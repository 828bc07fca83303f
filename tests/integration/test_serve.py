"""Starts of the server beside that of conftest.py: without an archive, and by TorchServe's own command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from lib.packaging.builder import ArchiveReport
from lib.server.java import find_java_home

from doubles.real_server import config_with_free_ports, ports_in_use, wait_until


def test_serve_fails_at_once_without_an_archive(project_dir: Path, tmp_path: Path) -> None:
    config, _ = config_with_free_ports(project_dir, tmp_path)
    command = [sys.executable, "scripts/serve.py", "--ts-config", str(config), "--model-store", str(tmp_path)]
    serve = subprocess.run(command, cwd=project_dir, capture_output=True, text=True, timeout=60)
    assert serve.returncode == 1
    assert "scripts/build_archive.py" in serve.stderr


@pytest.mark.slow
def test_torchserve_s_own_command_works_from_the_project_root(
    archive: ArchiveReport, project_dir: Path, tmp_path: Path, smear: bytes
) -> None:
    config, addresses = config_with_free_ports(project_dir, tmp_path)
    environment = {
        **os.environ,
        "JAVA_HOME": str(find_java_home()),
        "TMPDIR": str(tmp_path),
        "TEMP": str(tmp_path),
        "LOG_LOCATION": str(tmp_path / "logs"),
    }
    torchserve = [sys.executable, "-m", "ts.model_server"]
    options = ["--ncs", "--model-store", str(archive.path.parent), "--ts-config", str(config)]
    started = {"cwd": project_dir, "env": environment, "timeout": 60, "check": True}

    def is_ready() -> bool:
        try:
            model = requests.get(f"{addresses[1]}/models/damoyolo", timeout=60).json()[0]
        except (requests.RequestException, KeyError):
            return False
        return [worker["status"] for worker in model["workers"]] == ["READY"]

    subprocess.run([*torchserve, "--start", *options], stdout=subprocess.DEVNULL, **started)
    try:
        wait_until(is_ready, "the server being ready")
        answer = requests.post(f"{addresses[0]}/predictions/damoyolo", data=smear, timeout=120)
        assert len(answer.json()["detections"]) == 21
        assert "stage_seconds_total" in requests.get(f"{addresses[2]}/metrics", timeout=60).text
    finally:
        subprocess.run([*torchserve, "--stop", "--foreground"], stdout=subprocess.DEVNULL, **started)
    assert not ports_in_use(addresses[:1])
