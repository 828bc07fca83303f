import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lib.server.watcher import Watcher

from doubles.real_server import wait_until

# Starts a group of two processes, has it watched, prints their numbers, and waits.
PARENT = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
from lib.server.watcher import Watcher
watcher = Watcher(Path({folder!r}), ["sh", "-c", "cat >{note}"], "the text")
command = ["sh", "-c", "sleep 600 & echo $!; wait"]
group = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
watcher.kill_group_too(group.pid)
print(group.pid, group.stdout.readline().decode(), watcher._process.pid, flush=True)
sys.stdin.readline()
{ending}
"""


def ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def ignores(pid, number):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (line.split()[1] for line in lines if line.startswith("SigIgn:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.fixture
def parent(project_dir, tmp_path):
    """Starts PARENT; the process, the numbers that it prints, the folder, and what the command writes."""
    started = []

    def start(ending=""):
        folder, note = tmp_path / "folder", tmp_path / "note"
        folder.mkdir()
        (folder / "file").write_text("")
        code = PARENT.format(
            scripts=str(project_dir / "scripts"), folder=str(folder), note=note, ending=ending
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        numbers = list(map(int, (process.stdout.readline() + process.stdout.readline()).split()))
        started.append(process)
        return process, numbers, folder, note

    yield start
    for process in started:
        process.kill()
        if not process.stdout.closed:
            process.communicate()


def test_the_group_the_command_and_the_folder_follow_a_parent_that_is_killed(parent):
    process, numbers, folder, note = parent()
    process.kill()
    wait_until(lambda: all(map(ended, numbers)), "the end of group and watcher", 30.0)
    assert note.read_text() == "the text"
    assert not folder.exists()


def test_the_watcher_outlives_the_signals_of_a_terminal_and_a_service_manager(parent):
    process, (_, _, watcher), folder, _ = parent()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # All of them: the parent may have started with one ignored, as `nohup` has it.
    wait_until(lambda: all(ignores(watcher, each) for each in signals), "the start of the watcher", 30.0)
    for number in signals:
        os.kill(watcher, number)
    process.kill()
    wait_until(lambda: not folder.exists(), "the end of the folder", 30.0)


def test_a_dismissed_watcher_does_nothing(parent):
    process, (group, child, watcher), folder, note = parent("watcher.dismiss()")
    process.communicate("end\n", timeout=30)
    assert process.returncode == 0
    assert ended(watcher)
    assert not ended(child)
    assert folder.exists()
    assert not note.exists()
    os.killpg(group, signal.SIGKILL)


def test_a_watcher_that_was_killed_itself_holds_nobody(tmp_path):
    watcher = Watcher(Path(tmp_path))
    watcher._process.kill()
    watcher._process.wait()
    watcher.kill_group_too(2**22 + 1)
    watcher.dismiss()
