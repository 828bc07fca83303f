"""Runs the kernel tests of this folder on the CPU, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already interpreted")
def test_interpreted_kernels_agree_with_plain_torch(project_dir):
    pytest.importorskip("triton")
    # Triton decides once, when it is imported, whether to interpret: too late in this process. Tests that run
    # no kernel have run here already.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu", Path(__file__).parent],
        cwd=project_dir,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
