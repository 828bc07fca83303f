"""Detections without a detector."""

import numpy as np

from damoyolo.structures import Detections


def make_detections(boxes_xyxy, class_ids=None, scores=None, image_size_hw=(120, 200)):
    """The boxes of one image, by default with scores that fall from 0.9 to 0.3 and class 0."""
    count = len(boxes_xyxy)
    return Detections(
        boxes_xyxy=np.array(boxes_xyxy, dtype=np.float32).reshape(count, 4),
        scores=np.array(scores if scores is not None else np.linspace(0.9, 0.3, count), dtype=np.float32),
        class_ids=np.array(class_ids if class_ids is not None else [0] * count, dtype=np.int64),
        image_size_hw=image_size_hw,
    )
