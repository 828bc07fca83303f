"""The published DAMO-YOLO variants as typed data; fields hold only what differs between them.

Source: arXiv 2211.15444 and the configurations of tinyvision/DAMO-YOLO at commit 319572e.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import MappingProxyType

from torch import nn

from damoyolo.errors import ConfigError


class BackboneKind(Enum):
    """The kind of blocks in a TinyNAS backbone."""

    RESIDUAL = "residual"
    CSP = "csp"
    MOBILE = "mobile"


@dataclass(frozen=True)
class StageSpec:
    """Blocks in sequence at one resolution.

    hidden_channels: width inside a block (bottleneck of a residual block, expansion of a mobile one).
    """

    out_channels: int
    hidden_channels: int
    blocks: int


@dataclass(frozen=True)
class BackboneSpec:
    """A stem that halves the image, then the stages: five, or four of a CSP backbone.

    focus_stem: the stem gathers four pixel grids; otherwise it is a convolution of stride 2.
    """

    kind: BackboneKind
    stem_channels: int
    stages: tuple[StageSpec, ...]
    focus_stem: bool = True

    @property
    def out_channels(self) -> tuple[int, int, int]:
        """Channels of C3, C4 and C5 (strides 8, 16, 32)."""
        return self.stages[1].out_channels, self.stages[-2].out_channels, self.stages[-1].out_channels


@dataclass(frozen=True)
class VariantSpec:
    """One published network.

    neck_channels: of the outputs at strides 8, 16, 32. neck_blocks: in each fusion stage.
    neck_hidden_ratio: width inside a RepConv block of the neck, relative to its input.
    neck_depthwise: the neck has mobile blocks and depthwise separable convolutions instead.
    activation: of backbone and neck, except for a few layers with a fixed one.
    head_kernel_size: of the prediction convolutions.
    reg_max: R, the largest distance bin. input_size_hw: height and width in pixels as published.
    """

    name: str
    backbone: BackboneSpec
    neck_channels: tuple[int, int, int]
    neck_blocks: int
    activation: type[nn.Module]
    neck_hidden_ratio: float = 1.0
    neck_depthwise: bool = False
    head_kernel_size: int = 3
    reg_max: int = 16
    input_size_hw: tuple[int, int] = (640, 640)


def _stages(*stages: tuple[int, int, int]) -> tuple[StageSpec, ...]:
    """From output channels, hidden channels and number of blocks of each."""
    return tuple(StageSpec(*stage) for stage in stages)


_nano = partial(
    VariantSpec, neck_blocks=2, activation=nn.SiLU, neck_depthwise=True, reg_max=7, input_size_hw=(416, 416)
)

_SPECS = (
    VariantSpec(
        name="T",
        backbone=BackboneSpec(
            kind=BackboneKind.RESIDUAL,
            stem_channels=24,
            stages=_stages((64, 24, 2), (96, 64, 2), (192, 96, 2), (192, 152, 2), (384, 192, 1)),
        ),
        neck_channels=(64, 128, 256),
        neck_blocks=3,
        activation=nn.ReLU,
    ),
    VariantSpec(
        name="S",
        backbone=BackboneSpec(
            kind=BackboneKind.RESIDUAL,
            stem_channels=32,
            stages=_stages((128, 24, 1), (128, 88, 5), (256, 128, 3), (256, 120, 2), (512, 144, 1)),
        ),
        neck_channels=(128, 256, 512),
        neck_blocks=3,
        neck_hidden_ratio=0.75,
        activation=nn.ReLU,
    ),
    VariantSpec(
        name="M",
        backbone=BackboneSpec(
            kind=BackboneKind.CSP,
            stem_channels=32,
            stages=_stages((128, 64, 1), (128, 64, 3), (256, 256, 7), (512, 256, 2)),
        ),
        neck_channels=(128, 256, 512),
        neck_blocks=4,
        activation=nn.SiLU,
    ),
    VariantSpec(
        name="L",
        backbone=BackboneSpec(
            kind=BackboneKind.CSP,
            stem_channels=32,
            stages=_stages((128, 96, 2), (128, 96, 4), (256, 384, 9), (512, 384, 3)),
        ),
        neck_channels=(128, 256, 512),
        neck_blocks=6,
        activation=nn.SiLU,
    ),
    _nano(
        name="Ns",
        backbone=BackboneSpec(
            kind=BackboneKind.MOBILE,
            stem_channels=16,
            stages=_stages((24, 88, 1), (40, 160, 2), (64, 288, 2), (80, 400, 2), (160, 880, 2)),
            focus_stem=False,
        ),
        neck_channels=(40, 80, 160),
        head_kernel_size=1,
    ),
    _nano(
        name="Nm",
        backbone=BackboneSpec(
            kind=BackboneKind.MOBILE,
            stem_channels=16,
            stages=_stages((40, 144, 2), (64, 256, 2), (112, 504, 2), (128, 640, 2), (256, 1408, 1)),
            focus_stem=False,
        ),
        neck_channels=(64, 128, 256),
        head_kernel_size=1,
    ),
    _nano(
        name="Nl",
        backbone=BackboneSpec(
            kind=BackboneKind.MOBILE,
            stem_channels=24,
            stages=_stages((48, 168, 1), (80, 320, 2), (160, 720, 2), (160, 800, 3), (320, 1760, 2)),
            focus_stem=False,
        ),
        neck_channels=(80, 160, 320),
        head_kernel_size=1,
    ),
    _nano(
        name="N",
        backbone=BackboneSpec(
            kind=BackboneKind.MOBILE,
            stem_channels=16,
            stages=_stages((40, 144, 2), (80, 320, 2), (112, 504, 2), (112, 560, 2), (160, 880, 1)),
        ),
        neck_channels=(64, 128, 256),
    ),
)

VARIANTS: Mapping[str, VariantSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})


def get_variant(name: str) -> VariantSpec:
    """The variant called `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in VARIANTS:
        raise ConfigError(f"variant is {name!r}; accepted are {', '.join(VARIANTS)}")
    return VARIANTS[name]
