"""Add the Triton kernels of this machine's GPU to an archive, so that workers need not compile them.

    python scripts/precompile_kernels.py model_store/damoyolo.mar

Run it where the archive will be served, or on a machine with the same GPU and the same versions of PyTorch
and Triton. Other machines ignore the kernels and compile their own.

Prints how many files were added.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lib.archive.members import copy_archive, opened_archive
from lib.cli import ScriptError, command_parser, run_command
from lib.paths import DEMO_ARCHIVE

from damoyolo.cuda.kernel_cache import CACHE_VARIABLE, COMPILED_KERNELS_DIR

COMPILE_TIMEOUT_S = 600.0
# A fresh interpreter runs it inside the unpacked archive, as the server's worker would.
COMPILE = """
import pathlib, sys
from damoyolo.detector import Detector
detector = Detector.from_archive_dir(pathlib.Path.cwd(), sys.argv[1])
detector.warm_up([1, detector.config.graph_batch_sizes[-1]])
"""


def precompile_kernels(archive: Path, device: str) -> int:
    """Load the archive on the device, and put the kernels that this compiled in place of older ones.

    Returns:
        Number of files added.

    Raises:
        ScriptError: the archive does not run there, or needs no kernel.
    """
    from lib.archive.reader import archive_environment

    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=archive.parent) as name:
        folder, kernels = Path(name) / "archive", Path(name) / COMPILED_KERNELS_DIR
        with opened_archive(archive) as source:
            source.extractall(folder)
            members = source.namelist()
        try:
            done = subprocess.run(
                [sys.executable, "-c", COMPILE, device],
                cwd=folder,
                env=archive_environment(folder, **{CACHE_VARIABLE: str(kernels)}),
                capture_output=True,
                text=True,
                timeout=COMPILE_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise ScriptError(f"{archive} was not ready on {device} in {COMPILE_TIMEOUT_S:g} s") from error
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]  # of the traceback
            raise ScriptError(f"{archive} does not run on {device}: {reason}")
        files = [path for path in sorted(kernels.rglob("*")) if path.is_file()]
        if not files:
            raise ScriptError(
                f"{archive} compiled nothing on {device}; kernels are used on CUDA in fp16 and bf16 with "
                "cuda_graphs on, and with Triton installed"
            )
        prefix = f"{COMPILED_KERNELS_DIR}/"
        replaced: dict[str, bytes | None] = {
            **{member: None for member in members if member.startswith(prefix)},
            **{f"{prefix}{path.relative_to(kernels)}": path.read_bytes() for path in files},
        }
        copy_archive(archive, Path(name) / archive.name, replaced).replace(archive)
    return len(files)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and add."""
    return run_command(_run, _parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    files = precompile_kernels(arguments.archive.resolve(), arguments.device)
    print(f"{arguments.archive}: {files} files of compiled kernels added")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("archive", type=Path, nargs="?", default=DEMO_ARCHIVE)
    parser.add_argument("--device", default="cuda")
    return parser


if __name__ == "__main__":
    sys.exit(main())
