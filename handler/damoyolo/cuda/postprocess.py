"""Postprocessing that never waits: the work of `postprocess` in fixed shapes, fit for a CUDA graph.

`postprocess` defines the result. The kernels are sized for the usual image; one that has more candidates or
detections is marked and goes through `postprocess` afterwards, so that the result is the same for all.
Needs Triton: import this module where the device is CUDA.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from damoyolo.boxes import STRIDES
from damoyolo.cuda.kernels import detections as kernels
from damoyolo.postprocess import postprocess
from damoyolo.preprocess import scale_factors_xyxy
from damoyolo.structures import DetectionOptions, Detections, RawPredictions

BLOCK = 4096  # logits that a program reads at once: four loads of 16 bytes a thread
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
            max_candidates: what `postprocess` gets when it has to help.
            capacity: candidates of an image beyond which it has to; a power of two, at least 32.
            max_kept: detections of an image beyond which it has to.

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
        """Enqueue on the current stream, the one of the launch, the copy of what the next launch obeys.

        options: one an image, for the first images of the batch; the others get no detections.
        image_sizes_hw: original height and width of each of these images in pixels.

        Raises:
            ValueError: not one option and size an image, or too many.
        """
        count = len(options)
        if len(image_sizes_hw) != count or count > self.batch_size:
            raise ValueError(
                f"{count} options and {len(image_sizes_hw)} image sizes; one each is needed for up to "
                f"{self.batch_size} images"
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
            # One more than fits tells that something would be missing.
            words[:count, kernels.LIMIT] = [
                min(option.max_detections, self.max_kept + 1) for option in options
            ]
            words[:count, kernels.AGNOSTIC] = [option.class_agnostic for option in options]
            words[:count, int(kernels.CLASS_BITS) :] = self._class_bits(options)
        self._control.copy_(self._host_control, non_blocking=True)

    def _class_bits(self, options: Sequence[DetectionOptions]) -> NDArray[np.int32]:
        """(count, words) int32, bit k % 32 of word k // 32 set if class k is asked for."""
        asked_for = np.zeros((len(options), self.num_classes), dtype=np.uint8)
        for row, option in zip(asked_for, options, strict=True):
            row[slice(None) if option.class_ids is None else list(option.class_ids)] = 1
        padding = -self.num_classes % 32
        bits = np.packbits(np.pad(asked_for, ((0, 0), (0, padding))), axis=1, bitorder="little")
        return bits.view("<i4")

    def launch(self, raw: RawPredictions) -> None:
        """Enqueue the kernels and the copy of the result on the current stream; may be captured in a graph.

        raw: predictions of the whole batch size, any floating dtype and strides. Triton compiles at the first
            launch of each dtype and layout: launch once before a capture.

        Raises:
            ValueError: the predictions have other shapes than those announced.
        """
        self._check_shapes(raw)
        B, K, C = self.batch_size, self.num_classes, self.capacity
        control_floats = self._control.view(torch.float32)
        sizes = {"CAPACITY": C, "MAX_CANDIDATES": min(C, self.max_candidates)}
        blocks = [math.ceil(height * width * K / BLOCK) for height, width in self.level_sizes_hw]
        # Triton launches on the current device, whatever the device of the tensors.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            self._counts.zero_()
            _run(
                kernels.find_candidates,
                (sum(blocks), B),
                *raw.class_logits,
                control_floats,
                self._control,
                self._counts,
                self._keys,
                LEVELS=self._levels(raw.class_logits),
                K=K,
                CAPACITY=C,
                CONTROL_WIDTH=self.control_width,
                BLOCKS_8=blocks[0],
                BLOCKS_16=blocks[1],
                BLOCK=BLOCK,
                STEP=STEP,
            )
            _run(
                kernels.rank_and_decode,
                (math.ceil(C / RANK_ROWS), B),
                *raw.distance_logits,
                self._counts,
                self._keys,
                self._boxes,
                self._scores,
                self._class_ids,
                LEVELS=self._levels(raw.distance_logits),
                K=K,
                BIN_COUNT=self.bin_count,
                PADDED_BINS=1 << (self.bin_count - 1).bit_length(),
                ROWS=RANK_ROWS,
                CHUNK=RANK_CHUNK,
                **sizes,
            )
            _run(
                kernels.find_suppressors,
                (math.ceil(C / SUPPRESSOR_ROWS), math.ceil(C / SUPPRESSOR_COLUMNS), B),
                self._boxes,
                self._class_ids,
                self._counts,
                control_floats,
                self._control,
                self._suppressors,
                CONTROL_WIDTH=self.control_width,
                ROWS=SUPPRESSOR_ROWS,
                COLUMNS=SUPPRESSOR_COLUMNS,
                **sizes,
            )
            _run(
                kernels.resolve_and_write,
                (B,),
                self._boxes,
                self._scores,
                self._class_ids,
                self._counts,
                control_floats,
                self._control,
                self._suppressors,
                self._result,
                CONTROL_WIDTH=self.control_width,
                MAX_KEPT=self.max_kept,
                num_warps=16,
                **sizes,
            )
            self._host_result.copy_(self._result, non_blocking=True)

    def _check_shapes(self, raw: RawPredictions) -> None:
        for levels, channels in (
            (raw.class_logits, self.num_classes),
            (raw.distance_logits, 4 * self.bin_count),
        ):
            shapes = [tuple(logits.shape) for logits in levels]
            announced = [(self.batch_size, channels, *size_hw) for size_hw in self.level_sizes_hw]
            if shapes != announced:
                raise ValueError(f"predictions have shapes {shapes}; made for {announced}")

    def _levels(self, logits: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
        """Of each level its first anchor, height, width, pixels a cell, and the strides of its tensor."""
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
        """The detections of the last launch, which must be complete: wait for its stream or event before.

        Images that outgrew the buffers are computed anew from `raw`, which must still hold the predictions
        of that launch; the other arguments are those of `set_options`.
        """
        result: NDArray[np.float32] = self._host_result.numpy()  # B, 1 + max_kept, columns
        detections: list[Detections] = []
        for rows, image_size_hw in zip(result, image_sizes_hw, strict=False):  # the batch may be smaller
            returned = min(int(rows[0, kernels.RETURNED]), self.max_kept)
            kept = rows[1 : 1 + returned].copy()  # the next launch overwrites it
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
        """Which of the first `count` images of the last launch outgrew the buffers."""
        flags: NDArray[np.float32] = self._host_result.numpy()[:count, 0, int(kernels.OVERFLOWED)]
        return [int(image) for image in np.flatnonzero(flags)]


def _logit_bounds(score_thresholds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits that no logit whose float32 sigmoid is above the threshold is below or equal to.

    They spare the kernel nearly all sigmoids; what passes is compared with the threshold itself.
    """
    lowered = score_thresholds.astype(np.float64) * BOUND_FACTOR
    with np.errstate(divide="ignore"):  # a threshold of 0 gives -inf
        logits = np.log(lowered) - np.log1p(-lowered)
    bounds: NDArray[np.float32] = np.nextafter(logits.astype(np.float32), np.float32(-np.inf))
    return bounds


def _run(kernel: Any, grid: tuple[int, ...], *tensors: Tensor, **settings: Any) -> None:
    # Multiplications and additions must round one by one, as in torch: see the kernels.
    kernel[grid](*tensors, enable_fp_fusion=False, **settings)
