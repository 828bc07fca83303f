"""Run the network and its postprocessing: pixels on the device in, detections on the host out.

`EagerPipeline` is the reference: any backend, then `postprocess`. On CUDA in fp16 or bf16, `cuda.pipeline`
does the same with CUDA graphs of a fused network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from damoyolo.backends import Backend, open_backend
from damoyolo.backends.precision import WEIGHT_DTYPE, resolve_precision
from damoyolo.config import ServingConfig
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.postprocess import postprocess
from damoyolo.stage_timing import NETWORK, POSTPROCESS, StageTimer, no_timing
from damoyolo.structures import DetectionOptions, Detections, RawPredictions

# Images of one call on a CPU. Larger calls are no faster there, and could not be ended when a batch takes too
# long: 8 JSON requests of 16 images are 128 images.
CPU_BATCH_SIZE = 16


class Pipeline(Protocol):
    """The network and its postprocessing on one device. Not thread-safe.

    name, precision: of the backend that runs the network.
    max_batch_size: the most images of one call; None for no limit.
    pixels: (max_batch_size, 3, H, W) uint8 channels_last on the device; a batch written there is not copied.
        None if there is no such buffer.
    """

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def max_batch_size(self) -> int | None: ...

    @property
    def pixels(self) -> Tensor | None: ...

    def start(
        self,
        pixels: Tensor,
        options: Sequence[DetectionOptions],
        image_sizes_hw: Sequence[tuple[int, int]],
        time_stage: StageTimer = no_timing,
    ) -> Callable[[], list[Detections]]:
        """Begin a batch; the result waits for its end and gives the detections of each image.

        Call the result before the next `start`. Pixels may be written for the next batch before that, by work
        on the current stream.

        pixels: (B, 3, H, W) uint8 on the device, B at least 1 and at most `max_batch_size`.
        options, image_sizes_hw: one per image; original height and width in pixels.
        time_stage: called with the name of each stage; the context manager it returns wraps that stage.
        """
        ...

    def network_call(self, pixels: Tensor) -> Callable[[], RawPredictions]:
        """A call that runs only the network on `pixels`; its result is valid until the next call."""
        ...


class EagerPipeline:
    """A backend, then `postprocess`, nothing captured or padded. On a GPU it takes batches of any size."""

    pixels = None

    def __init__(self, backend: Backend, input_size_hw: tuple[int, int], max_candidates: int) -> None:
        self.backend = backend
        self.max_batch_size = CPU_BATCH_SIZE if backend.device.type == "cpu" else None
        self.input_size_hw = input_size_hw
        self.max_candidates = max_candidates

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.backend.name

    @property
    def precision(self) -> str:
        """The backend's precision."""
        return self.backend.precision

    def start(
        self,
        pixels: Tensor,
        options: Sequence[DetectionOptions],
        image_sizes_hw: Sequence[tuple[int, int]],
        time_stage: StageTimer = no_timing,
    ) -> Callable[[], list[Detections]]:
        """See `Pipeline.start`; the batch ends here already."""
        with time_stage(NETWORK):
            predictions = self.backend(pixels)
        with time_stage(POSTPROCESS):
            detections = postprocess(
                predictions, options, image_sizes_hw, self.input_size_hw, self.max_candidates
            )
        return lambda: detections

    def network_call(self, pixels: Tensor) -> Callable[[], RawPredictions]:
        """See `Pipeline.network_call`."""
        return functools.partial(self.backend, pixels)


def open_pipeline(
    model: DamoYolo,
    config: ServingConfig,
    input_size_hw: tuple[int, int],
    device: torch.device,
    model_dir: Path | None,
) -> Pipeline:
    """The fastest pipeline that the settings allow on the device.

    model: folded, on the CPU, in float32; the pipeline takes it over and may change it.
    model_dir: folder of the unpacked archive, which may hold the network in the format of other backends.

    Raises:
        ConfigError: the backend's library is missing, or it cannot run on the device or in the precision.
    """
    if device.type == "cuda" and config.cuda_graphs and config.backend in ("auto", "pytorch"):
        precision = resolve_precision(config.precision, device)
        if precision in WEIGHT_DTYPE:
            # Imported here because it needs Triton, which a worker on a CPU may not have.
            from damoyolo.cuda.pipeline import GraphPipeline

            return GraphPipeline.of_model(model, config, input_size_hw, device, precision)
    backend = open_backend(model, config, device, model_dir)
    return EagerPipeline(backend, input_size_hw, config.max_candidates)
