"""Where a Triton kernel can run, and how far rounding may take its sums from the exact ones.

Kernels run on a CUDA device, or on the CPU if Triton's interpreter is on from the start, as
`TRITON_INTERPRET=1 pytest tests/unit/damoyolo/cuda/kernels` has it and the child of `test_interpreted.py`.
"""

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
def kernel_device(request):
    """Each device on which kernels run."""
    pytest.importorskip("triton")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def rounding_bound():
    """How far activation(sum of products + bias) may be from its exact value, whatever adds the products up.

    Products of 16-bit numbers are exact in float32. Each of `terms` additions in float32 moves the result by
    at most eps of float32 times the sum of magnitudes, in whatever order they are done (Higham, Accuracy and
    Stability of Numerical Algorithms, 4.2; eps, twice the unit roundoff, covers hardware that truncates). The
    bias is one more addition, and an activation is worth three: SiLU multiplies by a sigmoid that is off by
    at most 2 eps, and rounds. No activation is steeper than 1.1 (SiLU). The result is rounded to `dtype`:
    half a step, which is at most eps / 2 of its magnitude, or half the smallest step near zero.

    terms: products in a sum. magnitudes: exact sum of the absolute values of the products and the bias.
    exact: exact result. All of one shape; the bound is in their type.
    """

    def bound(terms, magnitudes, exact, dtype):
        of_sum = 1.1 * (terms + 4) * torch.finfo(torch.float32).eps * magnitudes
        format_of_result = torch.finfo(dtype)
        smallest_step = format_of_result.smallest_normal * format_of_result.eps
        return of_sum + format_of_result.eps / 2 * (exact.abs() + of_sum) + smallest_step / 2

    return bound
