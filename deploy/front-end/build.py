"""Compile deploy/front-end/src into front-end.jar; equal sources and an equal compiler give equal bytes.

The jar also holds openapi.yaml, as JSON, which the front end answers at /openapi.json.

python deploy/front-end/build.py        needs a JDK (javac 11 or newer) and the package torchserve
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parent
SOURCES = FOLDER / "src"
DESCRIPTION = FOLDER / "openapi.yaml"
JAR = FOLDER / "front-end.jar"
SERVICE = "META-INF/services/org.pytorch.serve.servingsdk.ModelServerEndpoint"
MANIFEST = "META-INF/MANIFEST.MF"
OLDEST_JAVA = "11"  # what TorchServe needs
TIMESTAMP = (1980, 1, 1, 0, 0, 0)


def find_javac() -> str | None:
    """The compiler's path; None where there is none."""
    return shutil.which("javac")


def javac_version(javac: str) -> str:
    """Major version of the compiler; class files of different versions differ."""
    printed = subprocess.run([javac, "-version"], capture_output=True, text=True, check=True)
    match = re.search(r"javac (\d+)", printed.stdout + printed.stderr)
    return match.group(1) if match else "unknown"


def sources_digest() -> str:
    """Digest of the names and contents of the sources."""
    digest = hashlib.blake2b(digest_size=24)  # a line of a manifest has at most 72 bytes
    for path in [*sorted(SOURCES.rglob("*.java")), DESCRIPTION]:
        digest.update(f"{path.relative_to(FOLDER).as_posix()}\n{path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_manifest(jar: Path) -> dict[str, str]:
    """The entries of the jar's manifest."""
    with zipfile.ZipFile(jar) as opened:
        lines = opened.read(MANIFEST).decode().splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def build(target: Path, javac: str) -> None:
    """Write the jar.

    Raises:
        subprocess.CalledProcessError: the compiler found an error.
        FileNotFoundError: TorchServe is not installed.
    """
    spec = importlib.util.find_spec("ts")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package torchserve, whose classes the sources use, is not installed")
    server_jar = Path(spec.submodule_search_locations[0]) / "frontend" / "model-server.jar"
    with tempfile.TemporaryDirectory() as folder:
        classes = Path(folder)
        command = [javac, "--release", OLDEST_JAVA, "-proc:none", "-g:source,lines", "-cp", str(server_jar)]
        sources = sorted(map(str, SOURCES.rglob("*.java")))
        subprocess.run([*command, "-d", folder, *sources], check=True)
        manifest = {
            "Manifest-Version": "1.0",
            "Compiler": f"javac {javac_version(javac)}",
            "Sources-Digest": sources_digest(),
        }
        members = {
            MANIFEST: "".join(f"{name}: {value}\r\n" for name, value in manifest.items()).encode(),
            SERVICE: b"damoyolo.frontend.FrontEnd\n",
            "openapi.json": json.dumps(yaml.safe_load(DESCRIPTION.read_text()), indent=1).encode(),
        }
        for path in sorted(classes.rglob("*.class")):
            members[path.relative_to(classes).as_posix()] = path.read_bytes()
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as jar:
            for name, content in members.items():
                jar.writestr(zipfile.ZipInfo(name, TIMESTAMP), content)


def main() -> int:
    """Build the jar beside this file."""
    javac = find_javac()
    if javac is None:
        print("build: no javac on the path; install a JDK of version 11 or newer", file=sys.stderr)
        return 1
    build(JAR, javac)
    print(f"{JAR.name}: {JAR.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
