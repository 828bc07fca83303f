"""Find a Triton server, and what its Python backend needs to run in an environment of this project.

Triton is either in `.venv-triton`, which scripts/setup_environment.sh makes, or installed (in
/opt/tritonserver of NVIDIA's containers). `.venv-triton` is a virtual environment with the wheel nvidia-
pytriton, of which only the server and its Python backend are used, with NumPy 1, and with the packages of
.venv after its own.

The wheel's server, Triton 2.51, needs three things. Its backend looks for the program of its processes, of
which the wheel has one for each version of Python, in its own folder, where the wheel has none. That program
needs libpython3.X.so. And it was built for NumPy 1: with NumPy 2 every input has wrong bytes, which ends the
process (https://github.com/triton-inference-server/server/issues/7391). There is no NumPy 1 for Python 3.13.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from lib.cli import ScriptError
from lib.paths import PROJECT_DIR

INSTALL = ". scripts/setup_environment.sh; setup_environment requirements.txt && setup_triton"
ENVIRONMENT = PROJECT_DIR / ".venv-triton"
INSTALLED = Path("/opt/tritonserver")
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Program:
    """A server to start: its path, further arguments, and variables of its environment."""

    path: Path
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def find_program(folder: Path, environment: Path = ENVIRONMENT) -> Program:
    """The server of `environment`, or one that is installed.

    folder: an empty one, for the files of the backend.

    Raises:
        ScriptError: there is none, or it cannot run with this Python.
    """
    packages = _site_packages(environment)
    root = packages / "pytriton" / "tritonserver"
    if (root / "bin" / "tritonserver").is_file():
        return _of_wheel(root, environment, folder)
    installed = shutil.which("tritonserver", path=f"{INSTALLED / 'bin'}:{os.environ.get('PATH', '')}")
    if installed is None:
        raise ScriptError(
            f"no Triton server: neither tritonserver on the path or in {INSTALLED}, nor {root}; "
            f"`bash -c '{INSTALL}'` installs that"
        )
    return Program(Path(installed))


def _of_wheel(root: Path, environment: Path, folder: Path) -> Program:
    version = "{}.{}".format(*sys.version_info)
    stub = root / "python_backend_stubs" / version / STUB
    if not stub.is_file() or not (root.parents[1] / "numpy").is_dir():
        raise ScriptError(
            f"the Triton server in {environment} does not run with Python {version}: it needs a Python from "
            "3.10 to 3.12, and NumPy 1 beside it"
        )
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (*(root / "backends" / "python").iterdir(), stub):
        (backend / file.name).symlink_to(file)
    libraries = [str(find_libpython(environment).parent), str(root.parents[1] / "nvidia_pytriton.libs")]
    variables = {
        # The first python3 on the path is the one whose packages the backend's processes have.
        "PATH": f"{environment / 'bin'}:{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": ":".join(filter(None, [*libraries, os.environ.get("LD_LIBRARY_PATH")])),
    }
    return Program(root / "bin" / "tritonserver", [f"--backend-directory={folder / 'backends'}"], variables)


def find_libpython(environment: Path = ENVIRONMENT) -> Path:
    """The shared library of this Python, which the backend's processes load; that in `environment` if any.

    Raises:
        ScriptError: this Python has none.
    """
    name = "libpython{}.{}.so.1.0".format(*sys.version_info)
    folders = [
        str(environment / "lib"),
        sysconfig.get_config_var("LIBDIR"),
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
    ]
    for folder in filter(None, folders):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise ScriptError(
        f"{name} is not in {', '.join(filter(None, folders))}; Triton's Python backend needs it. Debian has "
        f"it in {name.partition('.so')[0]}; a Python built by pyenv has it with "
        "PYTHON_CONFIGURE_OPTS=--enable-shared"
    )


def _site_packages(environment: Path) -> Path:
    return environment / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
