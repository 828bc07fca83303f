"""The image of deploy/container, built and run by Podman, without a registry or large downloads.

It differs in two ways from what `docker build` makes on a user's machine. The base image is a Debian of the
same release, fresh from debootstrap. And its Python lets every virtual environment see the packages of this
one, so that the build's pip finds all pins of requirements.txt installed; the container gets that folder read
only, too.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from doubles.network_namespaces import why_not

PROGRAMS = ("podman", "runc", "debootstrap", "ip")
SUITE, SUITE_PYTHON = "bookworm", (3, 11)
BASE_IMAGE = "localhost/debian:bare"
IMAGE = "localhost/damoyolo:test"
HOST_PACKAGES = "/host-site-packages"
# Found before /usr/bin/python3.11. The environment's own setuptools would hide the pinned one.
PYTHON = f"""#!/bin/sh
/usr/bin/python3.11 "$@" || exit
if [ "$1 $2" = "-m venv" ]; then
    "$3/bin/python" -m pip uninstall -qy setuptools
    echo {HOST_PACKAGES} >"$3/lib/python3.11/site-packages/host.pth"
fi
"""
PACKAGES_VOLUME = f"{sysconfig.get_paths()['purelib']}:{HOST_PACKAGES}:ro"
# As docs/container.md has it. By itself Podman makes further folders writable, and raises limits, which not
# every machine allows.
RESTRICTED = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]
RESTRICTED += ["--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096", f"--volume={PACKAGES_VOLUME}"]
TMP = "--tmpfs=/tmp:rw,exec,size=1g,mode=1777"


def skip_without_podman():
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"the image is built as root by {', '.join(PROGRAMS)}; missing: {missing or 'root'}")
    if sys.version_info[:2] != SUITE_PYTHON:
        pytest.skip(f"{SUITE}'s Python {SUITE_PYTHON} cannot import packages of this Python")
    if (reason := why_not()) != "":
        pytest.skip(reason)


class Podman:
    """Podman as root, with images and containers of its own."""

    def __init__(self):
        # A short path, for its sockets.
        self.folder = Path(tempfile.mkdtemp(prefix="podman-", dir="/tmp"))
        self.command = ["podman", f"--root={self.folder}/storage", f"--runroot={self.folder}/run"]
        self.command += [f"--tmpdir={self.folder}/tmp", "--storage-driver=overlay"]
        # Neither needs systemd.
        self.command += ["--runtime=runc", "--cgroup-manager=cgroupfs"]

    def __call__(self, *arguments, timeout=60, check=True, **options):
        """Run a command; the finished process with its output as text."""
        done = subprocess.run(
            [*self.command, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, **options
        )
        assert not check or done.returncode == 0, (
            f"podman {arguments}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
        return done

    def close(self):
        """Leave nothing behind; each step is taken, and then the first failure is raised."""
        with contextlib.ExitStack() as steps:
            steps.callback(shutil.rmtree, self.folder)
            steps.callback(self, "rmi", "--all", "--force", timeout=120)
            steps.callback(self, "rm", "--all", "--force", "--time=0", timeout=120)


def import_debian(podman):
    """Make a Debian fresh from debootstrap the image BASE_IMAGE."""
    root, base = podman.folder / "debian", podman.folder / "debian.tar"
    command = ["debootstrap", "--variant=minbase", SUITE, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"debootstrap cannot make a Debian here: {done.stdout[-500:]}{done.stderr[-500:]}")
    python = root / "usr/local/bin/python3.11"
    python.write_text(PYTHON)
    python.chmod(0o755)
    # As in Debian's images: no package is written to the disk at once.
    (root / "etc/dpkg/dpkg.cfg.d/docker-apt-speedup").write_text("force-unsafe-io\n")
    subprocess.run(["tar", "-C", str(root), "-cf", str(base), "."], check=True, timeout=120)
    shutil.rmtree(root)
    podman("import", base, BASE_IMAGE, timeout=120)
    base.unlink()


def skip_where_no_container_runs(podman):
    options = ["--network=none", "--cpus=1", TMP]
    tried = podman("run", "--rm", *RESTRICTED, *options, BASE_IMAGE, "/bin/true", check=False)
    if tried.returncode != 0:
        pytest.skip(f"Podman cannot run a container of plain Debian here: {tried.stderr[-500:]}")


def build_image(podman, project_dir, variant="cuda"):
    """Build deploy/container/Dockerfile, every RUN of it, as IMAGE; what the build printed."""
    import_debian(podman)
    skip_where_no_container_runs(podman)
    build = ["build", "--pull=never", "--isolation=chroot", "--format=docker", f"--volume={PACKAGES_VOLUME}"]
    build += [f"--build-arg=BASE_IMAGE={BASE_IMAGE}", f"--build-arg=VARIANT={variant}", f"--tag={IMAGE}"]
    done = podman(*build, "--file=deploy/container/Dockerfile", project_dir, timeout=500, cwd=project_dir)
    return done.stdout + done.stderr
