"""Precision: which arithmetic the network runs in.

Whatever the precision, images enter as whole grey levels (exact in every one of the formats), the
matrix products accumulate in float32, and all that follows the raw predictions (sigmoid, softmax over the
distance bins, boxes, NMS) is computed in float32 by `boxes` and `postprocess`.
"""

from __future__ import annotations

import torch

from damoyolo.errors import ConfigError

PRECISIONS_OF_DEVICE = {
    "cuda": ("fp32", "tf32", "amp", "fp16", "bf16"),
    "cpu": ("fp32", "amp", "bf16"),
}
# amp is autocast in the device's fast 16-bit format.
AUTOCAST_DTYPE = {"cuda": torch.float16, "cpu": torch.bfloat16}
WEIGHT_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}


def cpu_computes_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); else bfloat16 is emulated."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_precision(requested: str, device: torch.device) -> str:
    """The precision to run `requested` in on `device`; "auto" becomes a concrete one.

    "auto" is the fastest that kept the AP of the demo weights within 0.003 of float32 where it was
    measured (README, "Precision"): fp16 on CUDA; on a CPU bf16 where the hardware has it, else fp32.

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
