"""Run network and postprocessing as CUDA graphs, with one wait per batch.

A graph is bound to its shapes and addresses. Therefore there is a pair of graphs for each of a few batch
sizes, a batch is padded to the next of them, pixels are written to one buffer, and the postprocessing has
fixed shapes (`cuda.postprocess`). The reference is `pipeline.EagerPipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from damoyolo.backends.precision import WEIGHT_DTYPE
from damoyolo.boxes import STRIDES
from damoyolo.config import ServingConfig
from damoyolo.cuda.device_turns import device_turns
from damoyolo.cuda.fuse import fuse
from damoyolo.cuda.graphs import capture, capture_stream
from damoyolo.cuda.postprocess import DevicePostprocess
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.stage_timing import NETWORK, POSTPROCESS, StageTimer, no_timing
from damoyolo.structures import DetectionOptions, Detections, RawPredictions


@dataclass(frozen=True)
class _CapturedBatch:
    """One batch size: the graphs of the network and of the postprocessing, and where their results are."""

    network: torch.cuda.CUDAGraph
    postprocessing: torch.cuda.CUDAGraph
    predictions: RawPredictions
    postprocess: DevicePostprocess


class GraphPipeline:
    """See `pipeline.Pipeline`.

    network: (B, 3, H, W) uint8 channels_last to RawPredictions, in fp16 or bf16 on the device; capturable.
    batch_sizes: sizes to capture; the largest is the limit of a call.
    max_candidates, max_kept: per image, before and after NMS; an image that keeps more is left to
        `postprocess`.
    """

    name = "pytorch"

    def __init__(
        self,
        network: Callable[[Tensor], RawPredictions],
        num_classes: int,
        reg_max: int,
        input_size_hw: tuple[int, int],
        device: torch.device,
        precision: str,
        batch_sizes: Sequence[int],
        max_candidates: int,
        max_kept: int,
        turns: int = 0,
    ) -> None:
        self._network = network  # kept alive for the graphs
        self.turns = device_turns(device, turns)
        self.device = device
        self.precision = precision
        self.input_size_hw = input_size_hw
        height, width = input_size_hw
        level_sizes_hw = [(height // stride, width // stride) for stride in STRIDES]
        self.max_batch_size = max(batch_sizes)
        canvas = torch.zeros((self.max_batch_size, height, width, 3), dtype=torch.uint8, device=device)
        self.pixels = canvas.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
        self._captured: dict[int, _CapturedBatch] = {}
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones then fit into the memory of the pool that all share. Sharing is
        # safe because only one is replayed at a time.
        for batch_size in sorted(set(batch_sizes), reverse=True):
            postprocess = DevicePostprocess(
                batch_size,
                num_classes,
                level_sizes_hw,
                reg_max,
                device,
                max_candidates=max_candidates,
                max_kept=max_kept,
            )
            self._captured[batch_size] = self._capture(batch_size, postprocess, pool)

    @classmethod
    def of_model(
        cls,
        model: DamoYolo,
        config: ServingConfig,
        input_size_hw: tuple[int, int],
        device: torch.device,
        precision: str,
    ) -> GraphPipeline:
        """The pipeline of a folded network on the CPU, which stays unchanged; precision is fp16 or bf16."""
        return cls(
            fuse(model).to(device, WEIGHT_DTYPE[precision]),
            model.num_classes,
            model.variant.reg_max,
            input_size_hw,
            device,
            precision,
            config.graph_batch_sizes,
            config.max_candidates,
            max_kept=config.max_detections,
            turns=config.device_turns,
        )

    @torch.inference_mode()
    def _capture(self, batch_size: int, postprocess: DevicePostprocess, pool: Any) -> _CapturedBatch:
        pixels = self.pixels[:batch_size]
        options = [DetectionOptions(score_threshold=1.0, iou_threshold=0.5, max_detections=1)] * batch_size
        postprocess.set_options(options, [self.input_size_hw] * batch_size, self.input_size_hw)
        with capture_stream(self.device, lambda: postprocess.launch(self._network(pixels))) as stream:
            network_graph, predictions = capture(lambda: self._network(pixels), stream, pool)
            postprocess_graph, _ = capture(lambda: postprocess.launch(predictions), stream, pool)
        return _CapturedBatch(network_graph, postprocess_graph, predictions, postprocess)

    def _load(self, pixels: Tensor) -> _CapturedBatch:
        """The graphs for a batch, whose pixels are copied to the buffer unless they are there already."""
        count = len(pixels)
        if pixels.data_ptr() != self.pixels.data_ptr():
            self.pixels[:count].copy_(pixels)
        return self._captured[min(size for size in self._captured if size >= count)]

    def network_call(self, pixels: Tensor) -> Callable[[], RawPredictions]:
        """See `Pipeline.network_call`; runs the next captured batch size."""
        captured = self._load(pixels)
        count = len(pixels)
        predictions = RawPredictions(
            *(tuple(level[:count] for level in levels) for levels in captured.predictions)
        )

        def replay() -> RawPredictions:
            captured.network.replay()
            return predictions

        return replay

    @torch.inference_mode()
    def start(
        self,
        pixels: Tensor,
        options: Sequence[DetectionOptions],
        image_sizes_hw: Sequence[tuple[int, int]],
        time_stage: StageTimer = no_timing,
    ) -> Callable[[], list[Detections]]:
        """See `Pipeline.start`; pixels that are the first rows of `self.pixels` are not copied."""
        captured = self._load(pixels)
        captured.postprocess.set_options(options, image_sizes_hw, self.input_size_hw)
        end_turn = self.turns.take()
        try:
            with time_stage(NETWORK):
                captured.network.replay()
            with time_stage(POSTPROCESS):
                captured.postprocessing.replay()
        except BaseException:
            end_turn()
            raise

        @torch.inference_mode()
        def finish() -> list[Detections]:
            with time_stage(POSTPROCESS):
                try:
                    # The stream, not an event: only waiting for a stream obeys `cuda.blocking_sync`.
                    torch.cuda.current_stream(self.device).synchronize()
                finally:
                    end_turn()
                return captured.postprocess.collect(
                    captured.predictions, options, image_sizes_hw, self.input_size_hw
                )

        return finish
