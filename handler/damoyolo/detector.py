"""Pictures in, detections out: calls the stages in their order, and nothing else does."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from damoyolo.backends import ONNX_FILE as ONNX_FILE
from damoyolo.backends import open_backend
from damoyolo.backends.precision import WEIGHT_DTYPE, resolve_precision
from damoyolo.config import ServingConfig
from damoyolo.cuda.fuse import rewrite
from damoyolo.cuda.preprocess import DevicePreprocessor
from damoyolo.errors import ConfigError, RequestError
from damoyolo.model.checkpoint import load_packaged
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.postprocess import postprocess
from damoyolo.preprocess import EncodedImage, ImagePreprocessor
from damoyolo.stage_timing import NETWORK, POSTPROCESS, PREPROCESS, StageObserver, unobserved
from damoyolo.structures import DetectionOptions, Detections

if TYPE_CHECKING:
    from damoyolo.cuda.pipeline import DevicePipeline

WEIGHTS_FILE = "damoyolo.pth"
SETTINGS_FILE = "model-config.yaml"


class Detector:
    """DAMO-YOLO on one device.

    Not for several threads at once: one batch at a time.
    """

    def __init__(
        self, model: DamoYolo, config: ServingConfig, device: torch.device, model_dir: Path | None = None
    ) -> None:
        self.config = config
        self.device = device
        self.input_size_hw = config.input_size_hw or model.variant.input_size_hw
        on_cuda = device.type == "cuda"
        self.pipeline = None
        if on_cuda and config.cuda_graphs and config.backend in ("auto", "pytorch"):
            precision = resolve_precision(config.precision, device)
            if precision in WEIGHT_DTYPE:
                self.pipeline = self._record_pipeline(model, WEIGHT_DTYPE[precision])
        self.engine = open_backend(model, config, device, model_dir)
        self.preprocessor: ImagePreprocessor | DevicePreprocessor = (
            DevicePreprocessor(config, self.input_size_hw, device)
            if on_cuda and config.gpu_jpeg_decoding
            else ImagePreprocessor(config, self.input_size_hw, device)
        )

    def _record_pipeline(self, model: DamoYolo, dtype: torch.dtype) -> DevicePipeline:
        # Imported here: a worker on a CPU never needs it.
        from damoyolo.cuda.pipeline import DevicePipeline

        return DevicePipeline(
            rewrite(model).to(self.device, dtype),
            model.num_classes,
            model.variant.reg_max,
            self.input_size_hw,
            self.device,
            self.config.graph_batch_sizes,
            self.config.max_candidates,
            max_kept=self.config.max_detections,
        )

    @classmethod
    def from_archive_dir(
        cls,
        model_dir: Path,
        device: torch.device | str = "cpu",
        precision: str | None = None,
        backend: str | None = None,
    ) -> Detector:
        """The detector of an unpacked archive.

        model_dir: folder with the packaged weights and model-config.yaml.
        precision, backend: in place of those in the settings.

        Raises:
            ConfigError, CheckpointError: what the archive holds does not fit together.
        """
        settings = yaml.safe_load((model_dir / SETTINGS_FILE).read_text())["handler"]
        changes = {"precision": precision, "backend": backend}
        settings |= {name: value for name, value in changes.items() if value is not None}
        return cls.from_settings(settings, model_dir / WEIGHTS_FILE, torch.device(device))

    @classmethod
    def from_settings(cls, settings: dict[str, Any], weights: Path, device: torch.device) -> Detector:
        """The detector of a `handler:` section and packaged weights; further forms of the network lie beside.

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
        return cls(model, config, device, weights.parent)

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
        if self.pipeline is not None and len(pictures) > (limit := self.pipeline.largest_batch):
            return [
                outcome
                for first in range(0, len(pictures), limit)
                for outcome in self.detect(
                    pictures[first : first + limit], options[first : first + limit], observe
                )
            ]
        with observe(PREPROCESS):
            batch = self.preprocessor.prepare(pictures, self.pipeline.pixels if self.pipeline else None)
        outcomes: dict[int, Detections | RequestError] = dict(batch.errors)
        if batch.slots:
            asked = [options[slot] for slot in batch.slots]
            if self.pipeline is not None:
                detections = self.pipeline.detect(asked, batch.image_sizes_hw, observe)
            else:
                detections = self._detect_plainly(batch.pixels, asked, batch.image_sizes_hw, observe)
            outcomes.update(zip(batch.slots, detections, strict=True))
        return [outcomes[index] for index in range(len(pictures))]

    def _detect_plainly(
        self,
        pixels: Tensor,
        options: Sequence[DetectionOptions],
        image_sizes_hw: Sequence[tuple[int, int]],
        observe: StageObserver,
    ) -> list[Detections]:
        with observe(NETWORK):
            predictions = self.engine(pixels)
        with observe(POSTPROCESS):
            return postprocess(
                predictions, options, image_sizes_hw, self.input_size_hw, self.config.max_candidates
            )

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Run each batch size once, so that no request pays for kernel choice and first allocations."""
        picture = io.BytesIO()
        Image.new("RGB", (640, 480)).save(picture, "JPEG")
        for batch_size in batch_sizes:
            self.detect([picture.getvalue()] * batch_size, [self.config.default_options()] * batch_size)

    def close(self) -> None:
        """End the decoding threads."""
        self.preprocessor.close()
