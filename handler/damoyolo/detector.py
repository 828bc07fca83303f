"""Detect objects in encoded images by calling the stages in order."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from damoyolo.checksums import check_sums
from damoyolo.config import SETTINGS_FILE, ServingConfig
from damoyolo.cuda.preprocess import DevicePreprocessor
from damoyolo.errors import ConfigError, RequestError
from damoyolo.formats import EncodedImage
from damoyolo.model.checkpoint import load_packaged
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.pipeline import open_pipeline
from damoyolo.preprocess import ImagePreprocessor, PreparedBatch
from damoyolo.stage_timing import PREPROCESS, StageTimer, no_timing
from damoyolo.structures import DetectionOptions, Detections, RawPredictions, Work
from damoyolo.time_budget import TimeBudget

WEIGHTS_FILE = "damoyolo.pth"


class Detector:
    """DAMO-YOLO on one device.

    pipeline: the network and its postprocessing. preprocessor: decodes and resizes the images of a batch.
    time_budget: of max_batch_seconds; it counts where the caller has entered its `batch`.

    Not thread-safe: one batch at a time.
    """

    def __init__(
        self, model: DamoYolo, config: ServingConfig, device: torch.device, model_dir: Path | None = None
    ) -> None:
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device is {device}; CUDA devices found: {torch.cuda.device_count()}")
        self.config = config
        self.device = device
        self.input_size_hw = config.input_size_hw or model.variant.input_size_hw
        self.pipeline = open_pipeline(model, config, self.input_size_hw, device, model_dir)
        preprocessor = (
            DevicePreprocessor if device.type == "cuda" and config.gpu_jpeg_decoding else ImagePreprocessor
        )
        self.time_budget = TimeBudget(config.max_batch_seconds)
        self.preprocessor = preprocessor(config, self.input_size_hw, device, self.time_budget)
        self._work = Work()

    @classmethod
    def from_archive_dir(
        cls,
        model_dir: Path,
        device: torch.device | str = "cpu",
        precision: str | None = None,
        backend: str | None = None,
        **serving: Any,
    ) -> Detector:
        """The detector of an unpacked archive.

        model_dir: folder with the packaged weights and model-config.yaml.
        precision, backend, serving: settings that take precedence over those of the archive.

        Raises:
            ConfigError, CheckpointError: settings, weights and device do not fit together.
        """
        settings = yaml.safe_load((model_dir / SETTINGS_FILE).read_text())["handler"]
        changes = {"precision": precision, "backend": backend}
        settings |= serving | {name: value for name, value in changes.items() if value is not None}
        return cls.from_settings(settings, model_dir / WEIGHTS_FILE, torch.device(device))

    @classmethod
    def from_settings(cls, settings: dict[str, Any], weights: Path, device: torch.device) -> Detector:
        """The detector of a `handler:` section and packaged weights.

        weights: in their folder the backends look for their own files of the network, and all of them are
            compared with the archive's SHA-256 sums.

        Raises:
            ConfigError, CheckpointError: settings, weights and device do not fit together.
        """
        config = ServingConfig.from_mapping(settings)
        check_sums(weights.parent, weights.name)
        model = load_packaged(weights)
        if model.variant.name != config.variant or model.num_classes != len(config.class_names):
            raise ConfigError(
                f"the settings are for variant {config.variant} with {len(config.class_names)} class names, "
                f"the weights for variant {model.variant.name} with {model.num_classes} classes; rebuild the "
                "archive"
            )
        return cls(model, config, device, weights.parent)

    def detect(
        self,
        images: Sequence[EncodedImage],
        options: Sequence[DetectionOptions],
        time_stage: StageTimer = no_timing,
    ) -> list[Detections | RequestError]:
        """The detections of each encoded image, or the error of that image, in the order of the images.

        images: encoded in an accepted format. options: one per image.
        time_stage: called with the name of each stage; the context manager it returns wraps that stage.
        """
        size = self.pipeline.max_batch_size or max(1, len(images))
        outcomes: list[Detections | RequestError] = []
        work = Work()
        finish = _nothing
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            try:
                with time_stage(PREPROCESS):
                    batch = self.preprocessor.prepare(images[part], self.pipeline.pixels)
            finally:
                # The device computed this part while the host prepared the next.
                outcomes += finish()
            work += Work(len(batch.slots) - batch.on_device, batch.on_device)
            if first and self.time_budget.is_spent():
                batch = _refuse_all(batch, self.time_budget.refusal())
            finish = self._start_batch(batch, options[part], time_stage)
        outcomes += finish()
        found = sum(len(outcome) for outcome in outcomes if isinstance(outcome, Detections))
        self._work += work + Work(detections=found)  # here, so that a call that failed counts nothing
        return outcomes

    def read_work(self) -> Work:
        """What was done since the last reading."""
        work, self._work = self._work, Work()
        return work

    def _start_batch(
        self, batch: PreparedBatch, options: Sequence[DetectionOptions], time_stage: StageTimer
    ) -> Callable[[], list[Detections | RequestError]]:
        outcomes: dict[int, Detections | RequestError] = dict(batch.errors)
        if not batch.slots:
            return lambda: [outcomes[index] for index in sorted(outcomes)]
        slot_options = [options[slot] for slot in batch.slots]
        finish_pipeline = self.pipeline.start(batch.pixels, slot_options, batch.image_sizes_hw, time_stage)

        def finish() -> list[Detections | RequestError]:
            outcomes.update(zip(batch.slots, finish_pipeline(), strict=True))
            return [outcomes[index] for index in sorted(outcomes)]

        return finish

    @torch.inference_mode()
    def raw_predictions(self, pixels: Tensor) -> RawPredictions:
        """The predictions of the served network for a batch, before postprocessing.

        pixels: (B, 3, H, W) uint8 on the device, B at least 1; split into batches that the pipeline takes.

        Returns predictions on the device; later calls do not overwrite them.
        """
        parts = torch.split(pixels, self.pipeline.max_batch_size or len(pixels))
        # Copies, because a CUDA graph overwrites its result at the next call.
        return RawPredictions.joined([self.pipeline.network_call(part)().clone() for part in parts])

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Run each batch size once, so that no request waits for kernel selection and first allocations."""
        image = io.BytesIO()
        Image.new("RGB", (640, 480)).save(image, "JPEG")
        for batch_size in batch_sizes:
            self.detect([image.getvalue()] * batch_size, [self.config.default_options()] * batch_size)

    def close(self) -> None:
        """End the decoding threads."""
        self.preprocessor.close()


def _refuse_all(batch: PreparedBatch, error: RequestError) -> PreparedBatch:
    """The batch without images; those that could be decoded get the error."""
    return PreparedBatch(batch.pixels[:0], [], [], batch.errors | dict.fromkeys(batch.slots, error))


def _nothing() -> list[Detections | RequestError]:
    return []
