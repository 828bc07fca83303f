"""The ceilings of a CUDA device, measured: matrix products in fp16 and INT8, and a copy of memory."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

import torch

from lib.measure.layers import Layer, flop, least_bytes
from lib.measure.timing import Call

MATRIX_SIZE = 8192
COPY_BYTES = 2**31


@dataclass(frozen=True)
class Ceilings:
    """fp16_flops, int8_flops: operations per second of a large product of random matrices. bytes_per_s: of a
    large copy, bytes read plus bytes written; all in units per second."""

    fp16_flops: float
    int8_flops: float
    bytes_per_s: float

    def as_facts(self) -> dict[str, float]:
        """The values under their names."""
        return asdict(self)


@torch.inference_mode()
def measure_ceilings(device: torch.device) -> Ceilings:
    """The medians of ten runs each."""
    n = MATRIX_SIZE
    a = torch.randn(n, n, device=device, dtype=torch.float16)
    b = torch.randn(n, n, device=device, dtype=torch.float16)
    fp16_s = _median_s(lambda: torch.mm(a, b))
    # The right-hand side is transposed in memory: the only layout of INT8 tensor cores.
    a8 = torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8)
    b8 = torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8).t()
    int8_s = _median_s(lambda: torch._int_mm(a8, b8))
    source = torch.empty(COPY_BYTES, device=device, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source))
    operations = 2.0 * n**3
    return Ceilings(operations / fp16_s, operations / int8_s, 2.0 * COPY_BYTES / copy_s)


def _median_s(call: Call) -> float:
    for _ in range(3):
        call()
    samples = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3)
    return float(statistics.median(samples))


def roofline_row(layer: Layer, ceilings: Ceilings) -> dict[str, object]:
    """What the layer must compute and move, and the least time for it in fp16."""
    operations, moved = flop(layer.work), least_bytes(layer.work)
    compute_us = operations / ceilings.fp16_flops * 1e6
    memory_us = moved / ceilings.bytes_per_s * 1e6
    return {
        "layer": layer.name,
        "count": layer.count,
        "gflop": operations / 1e9,
        "mib": moved / 2**20,
        "limit_us": max(compute_us, memory_us),
        "bound": "memory" if memory_us > compute_us else "compute",
    }
