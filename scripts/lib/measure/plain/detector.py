"""DAMO-YOLO as a plain PyTorch module that detects: float32, eager, torchvision's NMS.

It has the folded network of the archive, which is faster than the network as trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from damoyolo.boxes import decode_predictions
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS

SCORE_THRESHOLD, IOU_THRESHOLD, MAX_DETECTIONS = 0.25, 0.45, 300  # the defaults of ServingConfig


class PlainDetector(nn.Module):
    """Images to what torchvision's detectors answer."""

    def __init__(self, variant: str, num_classes: int, input_size_hw: tuple[int, int]) -> None:
        super().__init__()
        self.network = build_model(VARIANTS[variant], num_classes, folded=True)
        self.input_size_hw = input_size_hw

    @torch.inference_mode()
    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """`boxes` (N, 4) x1, y1, x2, y2 in pixels, `labels` (N,) and `scores` (N,), the best first.

        images: (B, 3, h, w) float32 RGB in 0..1.
        """
        height, width = images.shape[-2:]
        resized = nn.functional.interpolate(images, self.input_size_hw, mode="bilinear", antialias=True)
        scores, boxes = decode_predictions(self.network(255 * resized))  # B, A, K and B, A, 4
        scale = boxes.new_tensor((width, height) * 2) / boxes.new_tensor(self.input_size_hw[::-1] * 2)
        return [self._best(*each) for each in zip(scores, boxes * scale, strict=True)]

    @staticmethod
    def _best(scores: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Of one image. scores: (A, K). boxes: (A, 4)."""
        anchors, labels = (scores > SCORE_THRESHOLD).nonzero(as_tuple=True)
        kept = batched_nms(boxes[anchors], scores[anchors, labels], labels, IOU_THRESHOLD)[:MAX_DETECTIONS]
        anchors, labels = anchors[kept], labels[kept]
        return {"boxes": boxes[anchors], "labels": labels, "scores": scores[anchors, labels]}
