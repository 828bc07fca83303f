"""The first command of the README."""

import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from doubles.real_server import wait_until


@pytest.mark.slow
def test_two_demos_at_once_detect_draw_and_leave_nothing_running_whatever_proxy_is_set(project_dir):
    if not (project_dir / ".venv/bin/python").exists():
        pytest.skip("no .venv: scripts/test.sh makes it")
    drawn = project_dir / "output/smear_3_detected.jpg"
    drawn.unlink(missing_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # takes connections and never answers
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        environment = {**os.environ, **dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), url)}
        demos = [
            subprocess.Popen(
                ["bash", "scripts/demo.sh"],
                cwd=project_dir,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(2)
        ]
        with ThreadPoolExecutor(len(demos)) as threads:  # or a full pipe blocks one
            outputs = list(threads.map(lambda demo: demo.communicate(timeout=900)[0], demos))
    for demo, output in zip(demos, outputs, strict=True):
        assert demo.returncode == 0, output
        assert "640 x 480 pixels, 21 detections:" in output
        url = next(line for line in output.splitlines() if line.startswith("== curl")).split()[4]
        refused = subprocess.run(["curl", "--silent", "--max-time", "5", url], timeout=10, check=False)
        assert refused.returncode == 7  # nobody listens there any more
    with Image.open(drawn) as image:
        assert image.size == (640, 480)
    assert [path.name for path in drawn.parent.glob(f"{drawn.name}*")] == [drawn.name]


@pytest.mark.slow
def test_ctrl_c_ends_a_demo_that_serves_on_and_its_server(project_dir, tmp_path):
    if not (project_dir / ".venv/bin/python").exists():
        pytest.skip("no .venv: scripts/test.sh makes it")
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        demo = subprocess.Popen(
            ["bash", "scripts/demo.sh", "--keep-serving"],
            cwd=project_dir,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, as in a terminal
        )

    def serves_on():
        assert demo.poll() is None, output.read_text()
        return "== Serving on until Ctrl-C" in output.read_text()

    try:
        wait_until(serves_on, "the demo serving on", 300)
    finally:
        os.killpg(demo.pid, signal.SIGINT)
        code = demo.wait(120)
    text = output.read_text()
    assert code == 130, text
    after = text.partition("== Serving on until Ctrl-C\n")[2].splitlines()
    assert [line for line in after if line.startswith(("serve:", "demo:"))] == [
        "serve: SIGTERM, answering what was accepted; a second signal ends all at once"
    ]
    url = next(line for line in text.splitlines() if line.startswith("== curl")).split()[4]
    refused = subprocess.run(["curl", "--silent", "--max-time", "5", url], timeout=10, check=False)
    assert refused.returncode == 7  # nobody listens there any more


def test_an_unknown_word_is_refused(project_dir):
    demo = subprocess.run(
        ["bash", "scripts/demo.sh", "--keep"], cwd=project_dir, capture_output=True, text=True, timeout=30
    )
    assert demo.returncode == 2
    assert "--keep-serving" in demo.stderr
