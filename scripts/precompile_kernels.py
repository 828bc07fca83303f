"""Puts the Triton kernels of this machine's GPU into an archive, so that workers need not compile them.

    python scripts/precompile_kernels.py model_store/damoyolo.mar

Run it where the archive will be served, or on a machine with the same GPU and the same versions of PyTorch
and Triton: for others the kernels are of no use, and of no harm.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from lib.archive.reader import archive_environment
from lib.paths import DEMO_ARCHIVE

from damoyolo.cuda.kernel_cache import CACHE_VARIABLE, COMPILED_KERNELS_DIR

COMPILE_TIMEOUT_S = 600.0
# Run inside the unpacked archive by a fresh interpreter, as the server's worker would.
COMPILE = """
import pathlib, sys
from damoyolo.detector import Detector
detector = Detector.from_archive_dir(pathlib.Path.cwd(), sys.argv[1])
detector.warm_up([1, detector.config.graph_batch_sizes[-1]])
"""


class CompileError(Exception):
    """The archive does not run on the device."""


def precompile_kernels(archive: Path, device: str) -> int:
    """Load the archive on the device and add the kernels which that compiled, in place of older ones.

    Returns:
        Number of files added.

    Raises:
        CompileError: it does not load there, or needs no kernel.
    """
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=archive.parent) as name:
        folder, kernels = Path(name) / "archive", Path(name) / COMPILED_KERNELS_DIR
        with zipfile.ZipFile(archive) as source:
            source.extractall(folder)
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, device],
            cwd=folder,
            env=archive_environment(folder, **{CACHE_VARIABLE: str(kernels)}),
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        if done.returncode != 0:
            raise CompileError(f"{archive} does not run on {device}:\n{done.stderr}")
        files = [path for path in sorted(kernels.rglob("*")) if path.is_file()]
        if not files:
            raise CompileError(
                f"{archive} compiled nothing on {device}; kernels are used on CUDA in fp16 and bf16 with "
                "cuda_graphs on, and with Triton installed"
            )
        with_kernels = Path(name) / archive.name
        with zipfile.ZipFile(archive) as source, zipfile.ZipFile(with_kernels, "w") as target:
            for item in source.infolist():
                if not item.filename.startswith(f"{COMPILED_KERNELS_DIR}/"):
                    target.writestr(item, source.read(item))
            for path in files:
                target.write(path, f"{COMPILED_KERNELS_DIR}/{path.relative_to(kernels)}")
        with_kernels.replace(archive)
    return len(files)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and add."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = DEMO_ARCHIVE
    parser.add_argument("archive", type=Path, nargs="?", default=default)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(argv)
    try:
        files = precompile_kernels(arguments.archive.resolve(), arguments.device)
    except (CompileError, OSError, zipfile.BadZipFile, subprocess.TimeoutExpired) as error:
        print(f"precompile_kernels: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.archive}: {files} files of compiled kernels added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
