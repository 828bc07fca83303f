"""Pictures in, detections out: calls the stages in their order, and nothing else does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from damoyolo.accelerate import Engine
from damoyolo.checkpoint import load_packaged
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError, RequestError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.postprocess import postprocess
from damoyolo.preprocess import EncodedImage, ImagePreprocessor
from damoyolo.stages import NETWORK, POSTPROCESS, PREPROCESS, StageObserver, unobserved
from damoyolo.structures import DetectionOptions, Detections

WEIGHTS_FILE = "damoyolo.pth"
SETTINGS_FILE = "model-config.yaml"


class Detector:
    """DAMO-YOLO on one device.

    Not for several threads at once: one batch at a time.
    """

    def __init__(self, model: DamoYolo, config: ServingConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.input_size_hw = config.input_size_hw or model.variant.input_size_hw
        self.engine = Engine(model, device, config.precision)
        self.preprocessor = ImagePreprocessor(config, self.input_size_hw, device)

    @classmethod
    def from_archive_dir(
        cls, model_dir: Path, device: torch.device | str = "cpu", precision: str | None = None
    ) -> Detector:
        """The detector of an unpacked archive.

        model_dir: folder with the packaged weights and model-config.yaml.
        precision: in place of the one in the settings.

        Raises:
            ConfigError, CheckpointError: what the archive holds does not fit together.
        """
        settings = yaml.safe_load((model_dir / SETTINGS_FILE).read_text())["handler"]
        if precision is not None:
            settings = {**settings, "precision": precision}
        return cls.from_settings(settings, model_dir / WEIGHTS_FILE, torch.device(device))

    @classmethod
    def from_settings(cls, settings: dict[str, Any], weights: Path, device: torch.device) -> Detector:
        """The detector of a `handler:` section and packaged weights.

        Raises:
            ConfigError, CheckpointError: they do not fit together.
        """
        config = ServingConfig.from_mapping(settings)
        model = load_packaged(weights)
        if model.variant.name != config.variant or model.num_classes != len(config.class_names):
            raise ConfigError(
                f"the settings speak of variant {config.variant} with {len(config.class_names)} class names, "
                f"the weights are of variant {model.variant.name} with {model.num_classes} classes; "
                "build the archive anew"
            )
        return cls(model, config, device)

    def detect(
        self,
        pictures: Sequence[EncodedImage],
        options: Sequence[DetectionOptions],
        observe: StageObserver = unobserved,
    ) -> list[Detections | RequestError]:
        """The detections of each encoded picture, or the error that it alone caused; order is kept.

        pictures: encoded in an accepted format. options: one a picture.
        observe: called with the name of each stage; what it returns is entered around that stage.
        """
        with observe(PREPROCESS):
            batch = self.preprocessor.prepare(pictures)
        outcomes: dict[int, Detections | RequestError] = dict(batch.errors)
        if batch.slots:
            with observe(NETWORK):
                predictions = self.engine(batch.pixels)
            with observe(POSTPROCESS):
                detections = postprocess(
                    predictions,
                    [options[slot] for slot in batch.slots],
                    batch.image_sizes_hw,
                    self.input_size_hw,
                    self.config.max_candidates,
                )
            outcomes.update(zip(batch.slots, detections, strict=True))
        return [outcomes[index] for index in range(len(pictures))]

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Run each batch size once, so that no request pays for kernel choice and first allocations."""
        for batch_size in batch_sizes:
            pixels = torch.zeros((batch_size, 3, *self.input_size_hw), dtype=torch.uint8, device=self.device)
            options = [self.config.default_options()] * batch_size
            sizes_hw = [self.input_size_hw] * batch_size
            postprocess(
                self.engine(pixels), options, sizes_hw, self.input_size_hw, self.config.max_candidates
            )

    def close(self) -> None:
        """End the decoding threads."""
        self.preprocessor.close()
