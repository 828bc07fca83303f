from __future__ import annotations

import select
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from damoyolo.cuda.startup_lock import exclusive_device_lock

CUDA = torch.device("cuda", 1)
# Says "in", waits for a line, and leaves; the other process is inside in the meantime or it is not.
OTHER = """
import sys, torch
from damoyolo.cuda.startup_lock import exclusive_device_lock
print("waiting", flush=True)
with exclusive_device_lock(torch.device("cuda", int(sys.argv[1]))):
    print("in", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def temporary_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def start_other(index: int) -> subprocess.Popen[str]:
    handler_dir = str(Path(__file__).parents[4] / "handler")
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {handler_dir!r})\n{OTHER}", str(index)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    return process


def let_leave(process: subprocess.Popen[str]) -> None:
    """Return when the process has been inside and has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


def test_a_second_worker_waits_for_the_first(temporary_dir: Path) -> None:
    with exclusive_device_lock(CUDA):
        other = start_other(1)
        assert other.stdout is not None
        assert select.select([other.stdout], [], [], 1.0)[0] == []  # it has not said "in"
        (lock,) = temporary_dir.glob("damoyolo-*-cuda1.lock")
        assert lock.is_file()
    let_leave(other)


def test_workers_of_another_device_do_not_wait(temporary_dir: Path) -> None:
    with exclusive_device_lock(CUDA):
        let_leave(start_other(0))


def test_a_turn_ends_with_the_process_that_has_it(temporary_dir: Path) -> None:
    other = start_other(1)
    assert other.stdout is not None
    assert other.stdout.readline() == "in\n"
    other.kill()
    other.communicate(timeout=60)
    with exclusive_device_lock(CUDA):
        pass


def test_nobody_waits_on_a_cpu(temporary_dir: Path) -> None:
    with exclusive_device_lock(torch.device("cpu")):
        assert list(temporary_dir.iterdir()) == []
