import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from damoyolo.cuda.startup_lock import exclusive_device_lock

CUDA = torch.device("cuda", 1)
# Prints "in" when it has the lock, and releases it at the end of its input. Importing torch takes seconds.
OTHER = """
import sys, types
from damoyolo.cuda.startup_lock import exclusive_device_lock
print("waiting", flush=True)
with exclusive_device_lock(types.SimpleNamespace(type="cuda", index=int(sys.argv[1]))):
    print("in", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def temporary_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def start_other(index):
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(index)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[4] / "handler")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    return process


def finish(process):
    """Return when the process has had the lock and has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


def test_a_second_worker_waits_for_the_first(temporary_dir):
    with exclusive_device_lock(CUDA):
        other = start_other(1)
        assert other.stdout is not None
        assert select.select([other.stdout], [], [], 0.5)[0] == []  # it has not printed "in"
        (lock,) = temporary_dir.glob("damoyolo-*-cuda1.lock")
        assert lock.is_file()
    finish(other)


def test_workers_of_another_device_do_not_wait(temporary_dir):
    with exclusive_device_lock(CUDA):
        finish(start_other(0))


def test_the_lock_is_released_by_the_end_of_its_process(temporary_dir):
    other = start_other(1)
    assert other.stdout is not None
    assert other.stdout.readline() == "in\n"
    other.kill()
    other.communicate(timeout=60)
    with exclusive_device_lock(CUDA):
        pass


def test_there_is_no_lock_on_a_cpu(temporary_dir):
    with exclusive_device_lock(torch.device("cpu")):
        assert list(temporary_dir.iterdir()) == []


def foreign_link(path, victim):
    path.symlink_to(victim)


def foreign_file(path, _victim):
    path.write_text("")
    try:
        os.chown(path, os.getuid() + 1, -1)
    except PermissionError:
        pytest.skip("only root can give files away")


def fifo(path, _victim):
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("prepare", [foreign_link, foreign_file, fifo])
def test_a_file_that_another_user_may_have_put_there_is_not_used(temporary_dir, tmp_path, caplog, prepare):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    prepare(temporary_dir / f"damoyolo-{os.getuid()}-cuda1.lock", victim)
    entered = False
    with exclusive_device_lock(CUDA):
        entered = True
    assert entered
    assert victim.read_text() == "precious"
    assert "no lock while the network is prepared" in caplog.text
