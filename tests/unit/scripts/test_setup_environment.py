"""The environment that demo.sh and test.sh make: once, and never in the place of one that is not theirs."""

import os
import shlex
import shutil
import signal
import subprocess

import pytest

from doubles.real_server import wait_until

# Stands for Python: knows the calls that setup_environment.sh makes, and writes down those that take long.
PYTHON = """#!/bin/sh
case "$1 $2" in
    "-m venv") echo venv >>calls; sleep 0.3; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") echo pip >>calls
        echo "Collecting pinned==1"
        if [ -n "${PIP_FAILS:-}" ]; then echo "ERROR: no such version"; exit 1; fi
        if [ -n "${PIP_HANGS:-}" ]; then sleep 60; fi
        sleep 0.3 ;;
    "-c "*) exit 0 ;;
    --version*) echo "Python 3.12.0" ;;
    *java.py*) echo "$PWD/java" ;;
esac
"""


@pytest.fixture
def project(project_dir, tmp_path):
    """A folder with the script, one file of requirements and a stand-in for Python."""
    (tmp_path / "scripts").mkdir()
    source = project_dir / "scripts/setup_environment.sh"
    (tmp_path / "scripts/setup_environment.sh").write_text(source.read_text())
    (tmp_path / "requirements.txt").write_text("pinned==1\n")
    for name, text in (("python", PYTHON), ("java/bin/java", "#!/bin/sh\n")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def start(project, then="command -v python", **environment):
    command = f"set -eu; . scripts/setup_environment.sh; setup_environment requirements.txt; {then}"
    return subprocess.Popen(
        ["bash", "-c", command],
        cwd=project,
        env={**os.environ, "PYTHON": str(project / "python"), **environment},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def calls(project):
    path = project / "calls"
    return path.read_text().split() if path.exists() else []


def test_two_that_start_at_once_make_one_environment(project):
    for process in [start(project), start(project)]:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == str(project / ".venv/bin/python")
    assert calls(project) == ["venv", "pip"]


@pytest.mark.parametrize(
    ("environment", "setup", "file"),
    [
        (".venv-clients", "setup_clients", "tests/clients/requirements.txt"),
        (".venv-triton", "setup_triton", "deploy/triton/requirements.txt"),
    ],
)
def test_two_that_start_at_once_make_one_environment_beside_the_other(project, environment, setup, file):
    requirements = project / file
    requirements.parent.mkdir(parents=True)
    requirements.write_text("other==2\n")
    for count in (2, 1):  # then alone, with other pins
        for process in [start(project, setup) for _ in range(count)]:
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
        requirements.write_text("other==3\n")
    assert calls(project) == ["venv", "pip"] * 3
    assert (project / environment / "bin/python").exists()


@pytest.mark.parametrize("content", ["bin/keep", "a file", "a dangling link"])
def test_an_environment_of_others_that_cannot_be_used_is_left_as_it_is(project, content):
    environment = project / ".venv"
    if content == "bin/keep":
        (environment / "bin").mkdir(parents=True)
        (environment / content).write_text("mine")
    elif content == "a file":
        environment.write_text("mine")
    else:
        environment.symlink_to(project / "elsewhere")
    process = start(project)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert ".venv exists" in err
    assert "ensurepip" in err
    assert calls(project) == []
    if content == "bin/keep":
        assert (environment / content).read_text() == "mine"
    assert environment.is_symlink() == (content == "a dangling link")


def test_an_own_environment_that_was_left_half_done_is_made_again(project):
    (project / ".venv").mkdir()
    (project / ".venv/made-by-setup_environment").touch()
    (project / ".venv/bin").mkdir()
    (project / ".venv/bin/half").touch()
    process = start(project)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert calls(project) == ["venv", "pip"]
    assert not (project / ".venv/bin/half").exists()
    assert (project / ".venv/made-by-setup_environment").exists()


def test_what_pip_says_is_shown_when_it_fails(project):
    process = start(project, PIP_FAILS="yes")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "ERROR: no such version\n"
    assert not (project / ".venv/requirements.txt.installed").exists()


def test_an_interrupt_is_one_line_and_exit_code_130(project):
    process = start(project, PIP_HANGS="yes")
    wait_until(lambda: "pip" in calls(project), "pip")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "setup: interrupted\n"


def test_a_terminal_gets_a_line_of_progress(project):
    """`script` gives the command a terminal."""
    if shutil.which("script") is None:
        pytest.skip("no `script` (Debian: bsdutils)")
    pip = "echo Collecting a; echo Collecting b; sleep 2.5"
    source = f". scripts/setup_environment.sh; ({pip}) | show_progress"
    done = subprocess.run(
        ["script", "--quiet", "--return", "--command", f"bash -c {shlex.quote(source)}", "/dev/null"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert "collecting, 2 packages" in done.stdout
