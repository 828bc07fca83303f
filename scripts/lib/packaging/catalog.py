"""The checkpoints that the authors of DAMO-YOLO have published, by the name of their file.

Source: README.md of tinyvision/DAMO-YOLO. The file of the first nano network, damoyolo_tinynasL20_N_351, is
left out: it was made with blocks that upstream changed afterwards, and fits no variant of today.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

BASE_URL = "https://idstcv.oss-cn-zhangjiakou.aliyuncs.com/DAMO-YOLO/"


@dataclass(frozen=True)
class OfficialCheckpoint:
    """A file that can be downloaded.

    variant: name of the network it belongs to. url: where it lies.
    coco_ap: published AP at IoU 0.5:0.95 on COCO val2017 in percent; None where none was published.
    num_classes: 80 of COCO, or more. The files from before v0.3.0 may have a class channel on top of them,
        which `checkpoint.load_checkpoint` cuts off when it is told this number.
    """

    variant: str
    url: str
    coco_ap: float | None
    num_classes: int = 80


def _published(variant: str, path: str, coco_ap: float | None, num_classes: int = 80) -> OfficialCheckpoint:
    return OfficialCheckpoint(variant, BASE_URL + path, coco_ap, num_classes)


_CURRENT = "release_model/clean_model_0317/"
_NANO = "release_model/ckpt/before_distill/"
_OLD = "clean_models/before_distill/"
_OLD_DISTILLED = "clean_models/"

# The second file of a pair was trained with distillation.
# fmt: off
OFFICIAL_CHECKPOINTS: Mapping[str, OfficialCheckpoint] = MappingProxyType({
    "damoyolo_tinynasL20_T_420": _published("T", _CURRENT + "damoyolo_tinynasL20_T_420.pth", 42.0),
    "damoyolo_tinynasL20_T_436": _published("T", _CURRENT + "damoyolo_tinynasL20_T_436.pth", 43.6),
    "damoyolo_tinynasL25_S_460": _published("S", _CURRENT + "damoyolo_tinynasL25_S_460.pth", 46.0),
    "damoyolo_tinynasL25_S_477": _published("S", _CURRENT + "damoyolo_tinynasL25_S_477.pth", 47.7),
    "damoyolo_tinynasL35_M_492": _published("M", _CURRENT + "damoyolo_tinynasL35_M_492.pth", 49.2),
    "damoyolo_tinynasL35_M_502": _published("M", _CURRENT + "damoyolo_tinynasL35_M_502.pth", 50.2),
    "damoyolo_tinynasL45_L_508": _published("L", _CURRENT + "damoyolo_tinynasL45_L_508.pth", 50.8),
    "damoyolo_tinynasL45_L_519": _published("L", _CURRENT + "damoyolo_tinynasL45_L_519.pth", 51.9),
    "damoyolo_nano_small": _published("Ns", _NANO + "damoyolo_nano_small.pth", 32.3),
    "damoyolo_nano_middle": _published("Nm", _NANO + "damoyolo_nano_middle.pth", 38.2),
    "damoyolo_nano_large": _published("Nl", _NANO + "damoyolo_nano_large.pth", 40.5),
    "damoyolo_tinynasL20_T_418": _published("T", _OLD + "damoyolo_tinynasL20_T_418.pth", 41.8),
    "damoyolo_tinynasL20_T": _published("T", _OLD_DISTILLED + "damoyolo_tinynasL20_T.pth", 43.0),
    "damoyolo_tinynasL25_S_456": _published("S", _OLD + "damoyolo_tinynasL25_S_456.pth", 45.6),
    "damoyolo_tinynasL25_S": _published("S", _OLD_DISTILLED + "damoyolo_tinynasL25_S.pth", 46.8),
    "damoyolo_tinynasL35_M_487": _published("M", _OLD + "damoyolo_tinynasL35_M_487.pth", 48.7),
    "damoyolo_tinynasL35_M": _published("M", _OLD_DISTILLED + "damoyolo_tinynasL35_M.pth", 50.0),
    "damo_yolo_s_700+": _published("S", "Large-Scale-Training/damo_yolo_s_700%2B.pth", None, num_classes=701),
})
# fmt: on
