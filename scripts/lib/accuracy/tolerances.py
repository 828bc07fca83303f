"""How far a backend may differ from PyTorch in float32, for each precision. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerances:
    """The largest accepted differences.

    score: of any score, 0..1.
    box_px: of a side of a box that either of the two detects, in pixels of the network input.
    logit_noise: root mean square error of a class's logits, relative to their standard deviation.
    ap: by how much the AP may be lower.
    """

    score: float
    box_px: float
    logit_noise: float
    ap: float


# By precision. PyTorch on a CPU differed in float16 by at most 0.005, 0.5 px and 0.004, in bfloat16 by 0.075,
# 6.5 px and 0.04 (demo weights, 16 BCCD photographs and 3 smears). Those of tf32 and int8 are not measured.
TOLERANCES = {
    "fp32": Tolerances(score=1e-3, box_px=0.1, logit_noise=1e-3, ap=0.001),
    "tf32": Tolerances(score=0.02, box_px=2.0, logit_noise=0.02, ap=0.003),
    "fp16": Tolerances(score=0.02, box_px=2.0, logit_noise=0.02, ap=0.003),
    "amp": Tolerances(score=0.2, box_px=20.0, logit_noise=0.1, ap=0.003),
    "bf16": Tolerances(score=0.2, box_px=20.0, logit_noise=0.1, ap=0.003),
    "int8": Tolerances(score=0.4, box_px=32.0, logit_noise=0.4, ap=0.01),
}
