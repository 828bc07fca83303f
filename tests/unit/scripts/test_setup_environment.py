"""The environment that demo.sh and test.sh make: once, and never in the place of one that is not theirs."""

import os
import subprocess

import pytest

# Stands for Python: knows the calls that setup_environment.sh makes, and writes down those that take long.
PYTHON = """#!/bin/sh
case "$1 $2" in
    "-m venv") echo venv >>calls; sleep 0.3; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip") echo pip >>calls; sleep 0.3 ;;
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


def start(project):
    command = "set -eu; . scripts/setup_environment.sh; setup_environment requirements.txt; command -v python"
    return subprocess.Popen(
        ["bash", "-c", command],
        cwd=project,
        env={**os.environ, "PYTHON": str(project / "python")},
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
