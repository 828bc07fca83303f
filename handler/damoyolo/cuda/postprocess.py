"""Postprocess on the device in fixed shapes, without waiting for it, so that a CUDA graph can capture it.

`postprocess` defines the result. The kernels are sized for the usual image. An image with more candidates or
detections is marked and goes through `postprocess` afterwards, with the same result.
Needs Triton: import this module only where the device is CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from damoyolo.boxes import STRIDES
from damoyolo.cuda.kernels import detections as kernels
from damoyolo.cuda.kernels import launch
from damoyolo.postprocess import postprocess
from damoyolo.preprocess import scale_factors_xyxy
from damoyolo.structures import DetectionOptions, Detections, RawPredictions

BLOCK = 4096  # logits that a program reads at once: four loads of 16 bytes per thread
STEP = 512  # of these, the logits that are turned into candidates at once
SUPPRESSOR_ROWS, SUPPRESSOR_COLUMNS = 32, 64  # pairs of boxes that a program compares
# Candidates that a program ranks, and keys that it compares them with at once.
RANK_ROWS, RANK_CHUNK = 16, 256
# Lowers a threshold by more than the error of a float32 sigmoid.
BOUND_FACTOR = 1 - 1e-6


class DevicePostprocess:
    """Buffers and launches for batches of one size and one network; one batch at a time.

    The order of calls, for each batch:
        set_options   fills the pinned control buffer and enqueues its copy to the device
        launch        enqueues the kernels and the copy of the result, as does the replay of its graph
        (wait)        until the stream has passed the launch
        collect       reads the pinned result
    Both pinned buffers have one copy each: `set_options` of the next batch overwrites what the last launch
    reads, and its launch what `collect` reads. So call `set_options` only after the wait, and the next launch
    only after `collect`. To keep several batches in flight, give each an instance.
    """

    # Tensors made in inference mode could not be written to outside of it.
    @torch.inference_mode(False)
    def __init__(
        self,
        batch_size: int,
        num_classes: int,
        level_sizes_hw: Sequence[tuple[int, int]],
        reg_max: int,
        device: torch.device,
        *,
        max_candidates: int,
        capacity: int = 1024,
        max_kept: int = 300,
    ) -> None:
        """
        Args:
            batch_size: images of a launch; a batch may have fewer.
            level_sizes_hw: height and width of the levels of strides 8, 16, 32.
            max_candidates: of `postprocess`.
            capacity: most candidates of an image for the kernels; a power of two, at least 32.
            max_kept: most detections of an image for the kernels.

        Raises:
            ValueError: capacity is something else.
        """
        if capacity < 32 or capacity & (capacity - 1):
            raise ValueError(f"capacity is {capacity}; a power of two of at least 32 is needed")
        self.batch_size = batch_size
        self.num_classes = num_classes
        self.level_sizes_hw = tuple(level_sizes_hw)
        self.bin_count = reg_max + 1
        self.device = device
        self.max_candidates = max_candidates
        self.capacity = capacity
        self.max_kept = max_kept

        B, C = batch_size, capacity
        pinned = device.type == "cuda"
        class_words = math.ceil(num_classes / 32)
        self.control_width = int(kernels.CLASS_BITS) + class_words
        result_shape = (B, 1 + max_kept, int(kernels.RESULT_COLUMNS))
        self._host_control = torch.zeros((B, self.control_width), dtype=torch.int32, pin_memory=pinned)
        self._host_result = torch.zeros(result_shape, pin_memory=pinned)
        self._control = torch.zeros((B, self.control_width), dtype=torch.int32, device=device)
        self._result = torch.zeros(result_shape, device=device)
        self._counts = torch.zeros(B, dtype=torch.int32, device=device)
        self._keys = torch.zeros((B, C), dtype=torch.int64, device=device)
        self._boxes = torch.zeros((B, 4, C), device=device)
        self._scores = torch.zeros((B, C), device=device)
        self._class_ids = torch.zeros((B, C), dtype=torch.int32, device=device)
        self._suppressors = torch.zeros((B, C, C // 32), dtype=torch.int32, device=device)

    def set_options(
        self,
        options: Sequence[DetectionOptions],
        image_sizes_hw: Sequence[tuple[int, int]],
        input_size_hw: tuple[int, int],
    ) -> None:
        """Enqueue the copy of the options for the next launch on the current stream, that of the launch.

        options: one per image, for the first images of the batch; the others get no detections.
        image_sizes_hw: original height and width of each of these images in pixels.

        Raises:
            ValueError: there is not one option and size per image, or there are too many.
        """
        count = len(options)
        if len(image_sizes_hw) != count or count > self.batch_size:
            raise ValueError(
                f"{count} options and {len(image_sizes_hw)} image sizes; up to {self.batch_size} images "
                "need one of each"
            )
        words: NDArray[np.int32] = self._host_control.numpy()  # B, W
        floats = words.view(np.float32)
        floats[count:, kernels.LOGIT_BOUND] = np.inf  # no logit is above
        if count:
            thresholds = np.array([option.score_threshold for option in options], dtype=np.float32)
            floats[:count, kernels.LOGIT_BOUND] = _logit_bounds(thresholds)
            floats[:count, kernels.SCORE_THRESHOLD] = thresholds
            floats[:count, kernels.IOU_THRESHOLD] = [option.iou_threshold for option in options]
            scales_xyxy = scale_factors_xyxy(image_sizes_hw, input_size_hw)
            floats[:count, kernels.SCALE_X] = scales_xyxy[:, 0]
            floats[:count, kernels.SCALE_Y] = scales_xyxy[:, 1]
            # One more than fits shows that detections would be missing.
            words[:count, kernels.LIMIT] = [
                min(option.max_detections, self.max_kept + 1) for option in options
            ]
            words[:count, kernels.AGNOSTIC] = [option.class_agnostic for option in options]
            words[:count, int(kernels.CLASS_BITS) :] = self._class_bits(options)
        self._control.copy_(self._host_control, non_blocking=True)

    def _class_bits(self, options: Sequence[DetectionOptions]) -> NDArray[np.int32]:
        """(count, words) int32, bit k % 32 of word k // 32 is set if class k is requested."""
        requested = np.zeros((len(options), self.num_classes), dtype=np.uint8)
        for row, option in zip(requested, options, strict=True):
            row[slice(None) if option.class_ids is None else list(option.class_ids)] = 1
        padding = -self.num_classes % 32
        bits = np.packbits(np.pad(requested, ((0, 0), (0, padding))), axis=1, bitorder="little")
        return bits.view("<i4")

    def launch(self, raw: RawPredictions) -> None:
        """Enqueue the kernels and the copy of the result on the current stream; may be captured in a graph.

        raw: predictions of the whole batch size, any floating dtype and strides. Triton compiles at the first
            launch of each dtype and layout: launch once before a capture.

        Raises:
            ValueError: the shapes of the predictions are not those given to the constructor.
        """
        self._check_shapes(raw)
        self._counts.zero_()
        self._launch_find_candidates(raw.class_logits)
        self._launch_rank_and_decode(raw.distance_logits)
        self._launch_nms()
        self._host_result.copy_(self._result, non_blocking=True)

    def _launch_find_candidates(self, class_logits: Sequence[Tensor]) -> None:
        blocks = [math.ceil(h * w * self.num_classes / BLOCK) for h, w in self.level_sizes_hw]
        _run(
            kernels.find_candidates,
            (sum(blocks), self.batch_size),
            *class_logits,
            self._control.view(torch.float32),
            self._control,
            self._counts,
            self._keys,
            LEVELS=self._levels(class_logits),
            K=self.num_classes,
            CAPACITY=self.capacity,
            CONTROL_WIDTH=self.control_width,
            BLOCKS_8=blocks[0],
            BLOCKS_16=blocks[1],
            BLOCK=BLOCK,
            STEP=STEP,
        )

    def _launch_rank_and_decode(self, distance_logits: Sequence[Tensor]) -> None:
        _run(
            kernels.rank_and_decode,
            (math.ceil(self.capacity / RANK_ROWS), self.batch_size),
            *distance_logits,
            self._counts,
            self._keys,
            self._boxes,
            self._scores,
            self._class_ids,
            LEVELS=self._levels(distance_logits),
            K=self.num_classes,
            BIN_COUNT=self.bin_count,
            PADDED_BINS=1 << (self.bin_count - 1).bit_length(),
            ROWS=RANK_ROWS,
            CHUNK=RANK_CHUNK,
            CAPACITY=self.capacity,
            MAX_CANDIDATES=min(self.capacity, self.max_candidates),
        )

    def _launch_nms(self) -> None:
        control = (self._control.view(torch.float32), self._control)
        sizes = {
            "CAPACITY": self.capacity,
            "MAX_CANDIDATES": min(self.capacity, self.max_candidates),
            "CONTROL_WIDTH": self.control_width,
        }
        row_blocks, column_blocks = (
            math.ceil(self.capacity / block) for block in (SUPPRESSOR_ROWS, SUPPRESSOR_COLUMNS)
        )
        _run(
            kernels.find_suppressors,
            (row_blocks, column_blocks, self.batch_size),
            self._boxes,
            self._class_ids,
            self._counts,
            *control,
            self._suppressors,
            ROWS=SUPPRESSOR_ROWS,
            COLUMNS=SUPPRESSOR_COLUMNS,
            **sizes,
        )
        _run(
            kernels.resolve_and_write,
            (self.batch_size,),
            self._boxes,
            self._scores,
            self._class_ids,
            self._counts,
            *control,
            self._suppressors,
            self._result,
            MAX_KEPT=self.max_kept,
            num_warps=16,
            **sizes,
        )

    def _check_shapes(self, raw: RawPredictions) -> None:
        for levels, channels in (
            (raw.class_logits, self.num_classes),
            (raw.distance_logits, 4 * self.bin_count),
        ):
            shapes = [tuple(logits.shape) for logits in levels]
            expected = [(self.batch_size, channels, *size_hw) for size_hw in self.level_sizes_hw]
            if shapes != expected:
                raise ValueError(f"predictions have shapes {shapes}; expected are {expected}")

    def _levels(self, logits: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
        """For each level its first anchor, height, width, pixels per cell, and the strides of its tensor."""
        levels, first_anchor = [], 0
        for level, (height, width), stride in zip(logits, self.level_sizes_hw, STRIDES, strict=True):
            levels.append((first_anchor, height, width, stride, *level.stride()))
            first_anchor += height * width
        return tuple(levels)

    def collect(
        self,
        raw: RawPredictions,
        options: Sequence[DetectionOptions],
        image_sizes_hw: Sequence[tuple[int, int]],
        input_size_hw: tuple[int, int],
    ) -> list[Detections]:
        """The detections of the last launch; wait for its stream or event first.

        Images that exceed the buffers are computed again from `raw`, which must still hold the predictions of
        that launch; the other arguments are those of `set_options`.
        """
        result: NDArray[np.float32] = self._host_result.numpy()  # B, 1 + max_kept, columns
        detections: list[Detections] = []
        for rows, image_size_hw in zip(result, image_sizes_hw, strict=False):  # the batch may be smaller
            returned = min(int(rows[0, kernels.RETURNED]), self.max_kept)
            kept = rows[1 : 1 + returned].copy()  # the next launch overwrites them
            detections.append(
                Detections(
                    boxes_xyxy=kept[:, :4],
                    scores=kept[:, 4],
                    class_ids=kept[:, 5].astype(np.int64),
                    image_size_hw=image_size_hw,
                )
            )
        overflowed = self.overflowed(len(image_sizes_hw))
        if overflowed:
            exact = postprocess(
                RawPredictions(*(tuple(level[overflowed] for level in levels) for levels in raw)),
                [options[image] for image in overflowed],
                [image_sizes_hw[image] for image in overflowed],
                input_size_hw,
                self.max_candidates,
            )
            for image, image_detections in zip(overflowed, exact, strict=True):
                detections[image] = image_detections
        return detections

    def overflowed(self, count: int) -> list[int]:
        """Which of the first `count` images of the last launch exceed the buffers."""
        flags: NDArray[np.float32] = self._host_result.numpy()[:count, 0, int(kernels.OVERFLOWED)]
        return [int(image) for image in np.flatnonzero(flags)]


def _logit_bounds(score_thresholds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lower bounds: every logit whose float32 sigmoid is above the threshold is above its bound.

    They save the kernel nearly all sigmoids; the scores of the rest are compared with the threshold itself.
    """
    lowered = score_thresholds.astype(np.float64) * BOUND_FACTOR
    with np.errstate(divide="ignore"):  # a threshold of 0 gives -inf
        logits = np.log(lowered) - np.log1p(-lowered)
    bounds: NDArray[np.float32] = np.nextafter(logits.astype(np.float32), np.float32(-np.inf))
    return bounds


def _run(kernel: Any, grid: tuple[int, ...], *tensors: Tensor, **settings: Any) -> None:
    # Multiplications and additions must round separately, as in torch: see the kernels.
    launch(kernel, grid, *tensors, enable_fp_fusion=False, **settings)
