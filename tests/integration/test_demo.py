"""The first command of the README."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from PIL import Image


@pytest.mark.slow
def test_the_demo_detects_draws_and_leaves_nothing_running(project_dir: Path) -> None:
    if not (project_dir / ".venv/bin/python").exists():
        pytest.skip("no .venv: scripts/test.sh makes it")
    drawn = project_dir / "output/smear_3_detected.jpg"
    drawn.unlink(missing_ok=True)
    demo = subprocess.run(
        ["bash", "scripts/demo.sh"], cwd=project_dir, capture_output=True, text=True, timeout=900, check=False
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "640 x 480 pixels, 21 detections:" in demo.stdout
    with Image.open(drawn) as image:
        assert image.size == (640, 480)
    url = next(line for line in demo.stdout.splitlines() if line.startswith("== curl")).split()[4]
    refused = subprocess.run(["curl", "--silent", "--max-time", "5", url], timeout=10, check=False)
    assert refused.returncode == 7  # nobody listens there any more


def test_an_unknown_word_is_refused(project_dir: Path) -> None:
    demo = subprocess.run(
        ["bash", "scripts/demo.sh", "--keep"], cwd=project_dir, capture_output=True, text=True, timeout=30
    )
    assert demo.returncode == 2
    assert "--keep-serving" in demo.stderr
