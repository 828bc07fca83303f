import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from damoyolo.cuda.device_turns import DeviceTurns

GPU = "GPU-1"
# Prints "in" when it has a turn, and gives it back at the end of its input.
OTHER = """
import sys
from damoyolo.cuda import device_turns
device_turns.LONGEST_WAIT_S = 60
turns = device_turns.DeviceTurns(sys.argv[1], int(sys.argv[2]))
print("waiting", flush=True)
end = turns.take()
print("in", flush=True)
sys.stdin.readline()
end()
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def temporary_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def start_other():
    """Starts another worker; ended afterwards."""
    started = []

    def start(name=GPU, count=1):
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER, name, str(count)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[4] / "handler")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        started.append(process)
        assert process.stdout.readline() == b"waiting\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def has_its_turn(process, within_s):
    return bool(select.select([process.stdout], [], [], within_s)[0]) and process.stdout.readline() == b"in\n"


def test_a_worker_waits_until_a_turn_is_given_back(start_other):
    turns = DeviceTurns(GPU, 1)
    end_turn = turns.take()
    other = start_other()
    assert not has_its_turn(other, 0.3)
    end_turn()
    assert has_its_turn(other, 60)
    turns.close()


def test_as_many_workers_as_there_are_turns_go_on_at_once(start_other):
    turns = DeviceTurns(GPU, 2)
    end_turn = turns.take()
    first, second = start_other(count=2), start_other(count=2)
    found = select.select([first.stdout, second.stdout], [], [], 60)[0]
    assert len(found) == 1
    assert found[0].readline() == b"in\n"
    waiting = second if found[0] is first.stdout else first
    assert not has_its_turn(waiting, 0.3)
    end_turn()
    (first if waiting is second else second).stdin.write(b"\n")
    assert has_its_turn(waiting, 60)
    turns.close()


def test_the_end_of_a_worker_gives_its_turn_back(start_other):
    other = start_other()
    assert has_its_turn(other, 60)
    other.kill()
    other.wait(60)
    turns = DeviceTurns(GPU, 1)
    turns.take()()
    turns.close()


def test_workers_of_another_device_do_not_wait(start_other):
    turns = DeviceTurns(GPU, 1)
    turns.take()
    assert has_its_turn(start_other(name="GPU-2"), 60)
    turns.close()


def test_without_turns_nobody_waits_and_no_file_is_made(temporary_dir):
    turns = DeviceTurns(GPU, 0)
    turns.take()()
    assert list(temporary_dir.iterdir()) == []


def test_a_link_in_the_place_of_a_file_is_not_followed(temporary_dir, caplog):
    elsewhere = temporary_dir / "elsewhere"
    (temporary_dir / f"damoyolo-{os.getuid()}-{GPU}-turn1.lock").symlink_to(elsewhere)
    turns = DeviceTurns(GPU, 2)
    turns.take()()
    assert not elsewhere.exists()
    assert "do not take turns" in caplog.text


def test_a_worker_that_keeps_its_turn_delays_another_only_so_long(start_other, monkeypatch, caplog):
    monkeypatch.setattr("damoyolo.cuda.device_turns.LONGEST_WAIT_S", 0.2)
    assert has_its_turn(start_other(), 60)
    turns = DeviceTurns(GPU, 1)
    for _ in range(2):
        started_s = time.monotonic()
        turns.take()()
        assert 0.2 <= time.monotonic() - started_s < 10
    assert caplog.text.count("going on without") == 1
