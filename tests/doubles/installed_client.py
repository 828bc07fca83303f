"""The client as `pip install .` installs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


class InstalledClient:
    """The package in a folder of its own, with this interpreter and its other packages."""

    def __init__(self, project_dir, folder):
        source, self.folder = folder / "source", folder / "installed"
        source.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(project_dir / name, source)
        # Links stay links, which lead nowhere here: pip unpacks those of a zip archive as text.
        package = Path("scripts/damoyolo_client")
        shutil.copytree(project_dir / package, source / package, symlinks=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        options = ["--no-index", "--no-build-isolation", "--target", str(self.folder)]
        done = subprocess.run([*pip, *options, str(source)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        self.command = Path("bin/damoyolo-detect")
        self._environment = {**os.environ, "PYTHONPATH": str(self.folder)}

    def detect(self, *arguments):
        """Run damoyolo-detect in the folder."""
        return self.python(str(self.command), *map(str, arguments))

    def python(self, *arguments):
        """Run Python in the folder."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
