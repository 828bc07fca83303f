"""The checkpoints that the authors of DAMO-YOLO have published, by the name of their file.

Source: README.md of tinyvision/DAMO-YOLO. The file of the first nano network, damoyolo_tinynasL20_N_351, is
left out: its blocks were changed upstream afterwards, and it fits no variant of today.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from types import MappingProxyType
from urllib.parse import quote

BASE_URL = "https://idstcv.oss-cn-zhangjiakou.aliyuncs.com/DAMO-YOLO/"
# The second file of a pair was trained with distillation. All have COCO's 80 classes except the last, which
# has 701. Files from before v0.3.0 may have one more class channel, which `load_checkpoint` cuts off.
_PATHS = (
    "release_model/clean_model_0317/damoyolo_tinynasL20_T_420.pth",
    "release_model/clean_model_0317/damoyolo_tinynasL20_T_436.pth",
    "release_model/clean_model_0317/damoyolo_tinynasL25_S_460.pth",
    "release_model/clean_model_0317/damoyolo_tinynasL25_S_477.pth",
    "release_model/clean_model_0317/damoyolo_tinynasL35_M_492.pth",
    "release_model/clean_model_0317/damoyolo_tinynasL35_M_502.pth",
    "release_model/clean_model_0317/damoyolo_tinynasL45_L_508.pth",
    "release_model/clean_model_0317/damoyolo_tinynasL45_L_519.pth",
    "release_model/ckpt/before_distill/damoyolo_nano_small.pth",
    "release_model/ckpt/before_distill/damoyolo_nano_middle.pth",
    "release_model/ckpt/before_distill/damoyolo_nano_large.pth",
    "clean_models/before_distill/damoyolo_tinynasL20_T_418.pth",
    "clean_models/damoyolo_tinynasL20_T.pth",
    "clean_models/before_distill/damoyolo_tinynasL25_S_456.pth",
    "clean_models/damoyolo_tinynasL25_S.pth",
    "clean_models/before_distill/damoyolo_tinynasL35_M_487.pth",
    "clean_models/damoyolo_tinynasL35_M.pth",
    "Large-Scale-Training/damo_yolo_s_700+.pth",
)
# Name to URL.
OFFICIAL_CHECKPOINTS: Mapping[str, str] = MappingProxyType(
    {PurePosixPath(path).stem: BASE_URL + quote(path) for path in _PATHS}
)
