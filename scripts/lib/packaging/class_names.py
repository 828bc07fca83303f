"""The 80 class names of COCO, in the order of the published networks' class channels (labels 0-based)."""

from __future__ import annotations

import json
from pathlib import Path

from lib.paths import DEMO_WEIGHTS

# fmt: off
COCO_CLASS_NAMES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)
# fmt: on

DEMO_CLASS_NAMES = ("Platelets", "RBC", "WBC")


def default_class_names(weights: Path) -> tuple[str, ...]:
    """Those of a file of weights if nobody names them: the demo's for the demo weights, else COCO's 80."""
    return DEMO_CLASS_NAMES if weights.resolve() == DEMO_WEIGHTS.resolve() else COCO_CLASS_NAMES


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names of a text file (one a line) or a JSON file (a list, or an object of index to name)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    content = json.loads(text)
    if isinstance(content, dict):
        content = [content[str(index)] for index in range(len(content))]
    return tuple(map(str, content))
