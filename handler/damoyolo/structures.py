"""The values passed from stage to stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class DetectionOptions:
    """What one request wants from the postprocessing.

    score_threshold: candidates need a score strictly above it, 0..1.
    iou_threshold: a box is dropped if its IoU with a better kept one is strictly above it, 0..1.
    max_detections: at most this many are returned, the best ones.
    class_ids: only these classes take part; None for all.
    class_agnostic: boxes of different classes suppress each other too.
    """

    score_threshold: float
    iou_threshold: float
    max_detections: int
    class_ids: tuple[int, ...] | None = None
    class_agnostic: bool = False


class RawPredictions(NamedTuple):
    """The output of the network, one tensor per level (strides 8, 16, 32), before sigmoid and softmax.

    class_logits: (B, K, h, w) each.
    distance_logits: (B, 4 * (R + 1), h, w) each; channel = side * (R + 1) + bin, sides left, top, right,
        bottom; already multiplied by the level's learned scale.
    """

    class_logits: tuple[Tensor, ...]
    distance_logits: tuple[Tensor, ...]

    @classmethod
    def joined(cls, batches: Sequence[RawPredictions]) -> RawPredictions:
        """Concatenate at least one batch, in order."""
        import torch  # here, so that code which only needs the settings does not load it

        classes = zip(*(batch.class_logits for batch in batches), strict=True)
        distances = zip(*(batch.distance_logits for batch in batches), strict=True)
        return cls(tuple(map(torch.cat, classes)), tuple(map(torch.cat, distances)))

    def clone(self) -> RawPredictions:
        """A copy in its own memory."""
        return RawPredictions(*(tuple(level.clone() for level in levels) for levels in self))


@dataclass(frozen=True)
class Detections:
    """The detections of one image on the host, scores descending.

    boxes_xyxy: (N, 4) float32, x1, y1, x2, y2 in pixels of the original image as a viewer shows it.
    scores: (N,) float32, 0..1.
    class_ids: (N,) int64, index into the class names.
    image_size_hw: height and width of that image in pixels.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    image_size_hw: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Work:
    """What a detector did: images decoded by the CPU and by the GPU, and detections found in them."""

    cpu_images: int = 0
    gpu_images: int = 0
    detections: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.cpu_images + other.cpu_images,
            self.gpu_images + other.gpu_images,
            self.detections + other.detections,
        )
