"""Network and postprocessing of a batch as CUDA graphs: the host asks once and waits once.

A graph is bound to its shapes and addresses. So there is one pair of graphs for each of a few batch sizes, a
batch is padded to the next of them, pixels are written into one buffer, and the postprocessing has fixed
shapes (`cuda.postprocess`). The plain form of all this is `backends.pytorch`, then `postprocess`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from damoyolo.boxes import STRIDES
from damoyolo.cuda.postprocess import DevicePostprocess
from damoyolo.stage_timing import NETWORK, POSTPROCESS, StageObserver, unobserved
from damoyolo.structures import DetectionOptions, Detections, RawPredictions

# Runs before recording: Triton compiles and tunes, cuDNN chooses its kernels, the allocator settles.
WARM_UP_RUNS = 3


@dataclass(frozen=True)
class _Recording:
    """One batch size: what replays the network, what replays the rest, and where their results lie."""

    network: torch.cuda.CUDAGraph
    postprocessing: torch.cuda.CUDAGraph
    predictions: RawPredictions
    postprocess: DevicePostprocess


class DevicePipeline:
    """From pixels on the device to detections on the host.

    network: (B, 3, H, W) uint8 channels_last to RawPredictions, in fp16 or bf16 on the device; capturable.
    batch_sizes: those to record; the largest bounds what a call may bring.
    max_candidates, max_kept: of a picture, before and after NMS; one that keeps more goes the plain way.
    pixels: (largest, 3, H, W) uint8 channels_last; whoever calls `detect` has written the batch to its
        first rows, on the current stream.

    Not for several threads at once.
    """

    def __init__(
        self,
        network: Callable[[Tensor], RawPredictions],
        num_classes: int,
        reg_max: int,
        input_size_hw: tuple[int, int],
        device: torch.device,
        batch_sizes: Sequence[int],
        max_candidates: int,
        max_kept: int,
    ) -> None:
        self._network = network  # the graphs hold addresses of its weights, not the weights
        self.device = device
        self.input_size_hw = input_size_hw
        height, width = input_size_hw
        level_sizes_hw = [(height // stride, width // stride) for stride in STRIDES]
        largest = max(batch_sizes)
        canvas = torch.zeros((largest, height, width, 3), dtype=torch.uint8, device=device)
        self.pixels = canvas.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
        self._recordings: dict[int, _Recording] = {}
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones then find their memory in the pool that all share, which is
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
            self._recordings[batch_size] = self._record(batch_size, postprocess, pool)

    @torch.inference_mode()
    def _record(
        self,
        batch_size: int,
        postprocess: DevicePostprocess,
        pool: Any,
    ) -> _Recording:
        pixels = self.pixels[:batch_size]
        options = [DetectionOptions(score_threshold=1.0, iou_threshold=0.5, max_detections=1)] * batch_size
        postprocess.set_options(options, [self.input_size_hw] * batch_size, self.input_size_hw)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream), kernels_chosen_by_trial():
            for _ in range(WARM_UP_RUNS):
                postprocess.launch(self._network(pixels))
            stream.synchronize()
            network_graph, rest_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(network_graph, pool=pool, stream=stream):
                predictions = self._network(pixels)
            with torch.cuda.graph(rest_graph, pool=pool, stream=stream):
                postprocess.launch(predictions)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return _Recording(network_graph, rest_graph, predictions, postprocess)

    @property
    def largest_batch(self) -> int:
        """The most pictures of one call."""
        return max(self._recordings)

    def network_call(self, pictures: int) -> Callable[[], RawPredictions]:
        """The network alone as it runs for so many pictures, for measuring it."""
        recording = self._recording_for(pictures)

        def replay() -> RawPredictions:
            recording.network.replay()
            return recording.predictions

        return replay

    def _recording_for(self, pictures: int) -> _Recording:
        return self._recordings[min(size for size in self._recordings if size >= pictures)]

    @torch.inference_mode()
    def detect(
        self,
        options: Sequence[DetectionOptions],
        image_sizes_hw: Sequence[tuple[int, int]],
        observe: StageObserver = unobserved,
    ) -> list[Detections]:
        """The detections of the first `len(options)` pictures of `pixels`.

        options, image_sizes_hw: one a picture, at least one, at most `largest_batch`.
        observe: called with the name of each stage; what it returns is entered around that stage.
        """
        recording = self._recording_for(len(options))
        with observe(NETWORK):
            recording.postprocess.set_options(options, image_sizes_hw, self.input_size_hw)
            recording.network.replay()
        with observe(POSTPROCESS):
            recording.postprocessing.replay()
            # The stream, not an event: only waiting for a stream obeys `cuda.blocking_sync`.
            torch.cuda.current_stream(self.device).synchronize()
            return recording.postprocess.collect(
                recording.predictions, options, image_sizes_hw, self.input_size_hw
            )


@contextlib.contextmanager
def kernels_chosen_by_trial() -> Iterator[None]:
    """Have cuDNN time its kernels for each new shape; afterwards other networks choose as before."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
