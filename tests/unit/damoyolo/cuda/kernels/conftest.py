"""Where a Triton kernel can run: on a CUDA device, or on the CPU if its interpreter is on from the start.

`TRITON_INTERPRET=1 pytest tests/unit/kernels` interprets; `test_interpreted.py` does so in a child process.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(
    params=[
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(not INTERPRETED, reason="in the child process of test_interpreted.py"),
        ),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"
                ),
            ],
        ),
    ]
)
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Each device on which kernels run."""
    pytest.importorskip("triton")
    return torch.device(request.param)
