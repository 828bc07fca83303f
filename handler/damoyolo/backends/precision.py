"""Decide in which precision the network runs.

Whatever the precision, images enter as integers 0..255 (exact in every format), matrix products accumulate in
float32, and everything after the raw predictions (sigmoid, softmax over the distance bins, boxes, NMS) is
computed in float32 by `boxes` and `postprocess`.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from damoyolo.errors import ConfigError

logger = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")

PRECISIONS_OF_DEVICE = {
    "cuda": ("fp32", "tf32", "amp", "fp16", "bf16"),
    "cpu": ("fp32", "amp", "bf16"),
}
# Of backends that run an ONNX file or a converted network. TensorRT's is fixed when the engine is built.
PRECISIONS_OF_BACKEND = {"openvino": ("fp32", "bf16"), "onnxruntime": ("fp32",)}
# amp is autocast in the device's fast 16-bit format.
AUTOCAST_DTYPE = {"cuda": torch.float16, "cpu": torch.bfloat16}
WEIGHT_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}


def cpu_computes_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); else bfloat16 is emulated."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def cpu_sums_int8_exactly() -> bool:
    """Whether this CPU adds products of 8-bit integers in 32 bits (AVX512-VNNI, AVX-VNNI).

    x86 without these instructions adds two of them in 16 bits, which can saturate. A CPU that lists no x86
    flags counts as exact.
    """
    try:
        flags = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return True
    return flags is None or not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags[1].split())


def warn_of_inexact_int8(backend: str) -> None:
    """Log a warning where the sums of an INT8 file may saturate."""
    if not cpu_sums_int8_exactly():
        logger.warning(
            "this processor has no VNNI instructions: sums of the INT8 network can saturate in %s; compare "
            "its accuracy with float32 on this processor (docs/quantization.md)",
            backend,
        )


def resolve_precision(requested: str, device: torch.device) -> str:
    """The precision of PyTorch on `device`; "auto" becomes a concrete one.

    "auto" is the fastest one that kept the AP of the demo weights within 0.003 of float32 in our measurements
    (docs/precision.md): fp16 on CUDA; on a CPU bf16 where the hardware has it, else fp32.

    Raises:
        ConfigError: the device cannot run it.
    """
    accepted = PRECISIONS_OF_DEVICE.get(device.type)
    if accepted is None:
        raise ConfigError(f"device is {device}; accepted are cpu and cuda[:index]")
    if requested == "auto":
        if device.type == "cuda":
            return "fp16"
        return "bf16" if cpu_computes_bf16() else "fp32"
    if requested not in accepted:
        raise ConfigError(
            f"precision is {requested!r}; accepted on {device.type} are auto, {', '.join(accepted)}"
        )
    return requested


def resolve_backend_precision(requested: str, backend: str) -> str:
    """The precision of another backend (`PRECISIONS_OF_BACKEND`), "auto" as in `resolve_precision` on a CPU.

    Raises:
        ConfigError: the backend does not have it.
    """
    accepted = PRECISIONS_OF_BACKEND[backend]
    if requested == "auto":
        return "bf16" if "bf16" in accepted and cpu_computes_bf16() else "fp32"
    if requested not in accepted:
        raise ConfigError(
            f"precision is {requested!r}; accepted with backend {backend} are auto, {', '.join(accepted)} "
            "(a quantised ONNX file runs in int8 with each of them)"
        )
    return requested
