"""The classes of COCO, and the category ids that stand for a network's classes in files of COCO's format.

This file is in handler/damoyolo and in scripts/damoyolo_client: each is distributed without the other, and a
link would be lost in a zip archive of the project. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

# In the order of the published networks' class channels (labels 0-based).
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

# COCO's paper named 91 categories, and its instances have 80 of them, which kept their numbers.
_ABSENT_IDS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
_COCO_IDS = dict(
    zip(COCO_CLASS_NAMES, (number for number in range(1, 91) if number not in _ABSENT_IDS), strict=True)
)


def coco_category_ids(class_names: Sequence[str]) -> tuple[int, ...]:
    """The COCO category id of each class, by class id.

    If the names are those of COCO's 80 classes, in any order, these are COCO's own ids from 1 to 90.
    Otherwise it is the class id plus 1: category ids of most data sets in COCO's format begin at 1.
    """
    if set(class_names) == set(COCO_CLASS_NAMES):
        return tuple(_COCO_IDS[name] for name in class_names)
    return tuple(range(1, len(class_names) + 1))
