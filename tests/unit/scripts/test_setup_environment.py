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
    "-c "*) case "$2" in
            *project.pth*) packages=$(dirname "$0")/../lib/python3/site-packages
                mkdir -p "$packages"; echo "$3" >"$packages/project.pth" ;;
            *purelib*) echo "${PACKAGES:-/packages}" ;;
        esac ;;
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


@pytest.fixture
def triton(project):
    """The project with the file of Triton's packages; returns the folder of the environment."""
    path = project / "deploy/triton/requirements.txt"
    path.parent.mkdir(parents=True)
    path.write_text("other==2\n")
    return project / ".venv-triton"


def test_tritons_environment_is_made_again_for_another_python_or_folder(project, triton):
    """Else its packages would be looked for where they are not, and its tests be skipped for that."""
    for packages in ("/old/lib/python3.11/site-packages",) * 2 + ("/new/lib/python3.12/site-packages",):
        process = start(project, "setup_triton", PACKAGES=packages)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        (link,) = triton.glob("lib/*/site-packages/project.pth")
        assert link.read_text() == f"{packages}\n"
    assert calls(project) == ["venv", "pip"] * 3


def test_the_tests_do_without_triton_where_it_cannot_be_installed(project, triton):
    """As on a machine with an older glibc; whoever asks for Triton alone gets the failure."""
    first = start(project)
    first.communicate(timeout=60)
    process = start(project, "setup_triton_if_possible; echo going on", PIP_FAILS="yes")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.splitlines()[-1]) == (0, "going on")
    assert err.startswith("ERROR: no such version\n== Without Triton")
    assert not (triton / "requirements.txt.installed").exists()
    process = start(project, "setup_triton; echo going on", PIP_FAILS="yes")
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, "going on" in out) == (1, False)


def test_an_interrupt_while_triton_is_installed_ends_all(project, triton):
    start(project).communicate(timeout=60)
    process = start(project, "setup_triton_if_possible; echo going on", PIP_HANGS="yes")
    wait_until(lambda: calls(project) == ["venv", "pip"] * 2, "pip")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err, "going on" in out) == (130, "setup: interrupted\n", False)


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
