"""Describe the ONNX form of the network: its inputs and outputs, and the metadata that identify a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from damoyolo.boxes import STRIDES
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo
from damoyolo.structures import RawPredictions

INPUT_NAME = "images"  # (B, 3, H, W) uint8 RGB, sizes free, H and W multiples of 32
CLASS_OUTPUTS = tuple(f"class_logits_{stride}" for stride in STRIDES)
DISTANCE_OUTPUTS = tuple(f"distance_logits_{stride}" for stride in STRIDES)
OUTPUT_NAMES = (*CLASS_OUTPUTS, *DISTANCE_OUTPUTS)  # as in RawPredictions, float32


@dataclass(frozen=True)
class OnnxMetadata:
    """What an ONNX file was exported from.

    form: "raw" (raw predictions, which the backends run), "boxes" or "detections" (for use elsewhere).
    precision: "fp32", or "int8" where convolutions were quantised.
    weights_digest: of the float32 weights (`weights_digest`).
    """

    variant: str
    num_classes: int
    class_names: tuple[str, ...]
    reg_max: int
    precision: str
    weights_digest: str
    form: str = "raw"

    def to_metadata(self) -> dict[str, str]:
        """As `metadata_props` of a file, which hold text only."""
        values = asdict(self) | {"class_names": json.dumps(self.class_names)}
        return {name: str(value) for name, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> OnnxMetadata:
        """Read what `to_metadata` wrote.

        Raises:
            ConfigError: an entry is missing or unreadable; names the file and the entry.
        """
        try:
            return cls(
                variant=metadata["variant"],
                num_classes=int(metadata["num_classes"]),
                class_names=tuple(map(str, json.loads(metadata["class_names"]))),
                reg_max=int(metadata["reg_max"]),
                precision=metadata["precision"],
                weights_digest=metadata["weights_digest"],
                form=metadata["form"],
            )
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{path.name} does not say what it holds ({type(error).__name__}: {error}); accepted are "
                "files written by scripts/export_onnx.py"
            ) from error


def metadata_of(model: DamoYolo, class_names: Sequence[str], form: str = "raw") -> OnnxMetadata:
    """The metadata of a float32 file of `model`."""
    return OnnxMetadata(
        variant=model.variant.name,
        num_classes=model.num_classes,
        class_names=tuple(class_names),
        reg_max=model.variant.reg_max,
        precision="fp32",
        weights_digest=weights_digest(model),
        form=form,
    )


def weights_digest(model: DamoYolo) -> str:
    """SHA-256 over names and values of the weights, in hexadecimal; the model is folded and in float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_compatible(
    metadata: OnnxMetadata,
    path: Path,
    config: ServingConfig,
    model: DamoYolo,
    precisions: Sequence[str] = ("fp32", "int8"),
) -> None:
    """Refuse a file that was made from another network than the archive's, or in another precision.

    Raises:
        ConfigError: names what differs.
    """
    expected = metadata_of(model, config.class_names)
    for name in ("form", "variant", "num_classes", "class_names", "reg_max", "weights_digest"):
        found, wanted = getattr(metadata, name), getattr(expected, name)
        if found != wanted:
            raise ConfigError(
                f"{path.name} is of {name} {_shown(found)}, settings and weights of the archive are of "
                f"{_shown(wanted)}; make it again from these weights, or build the archive without it"
            )
    if metadata.precision not in precisions:
        raise ConfigError(
            f"{path.name} is of precision {metadata.precision!r}; accepted are {' and '.join(precisions)}"
        )


class RawOutputs(nn.Module):
    """The network in raw form: uint8 images in, the tensors of RawPredictions as one flat tuple out."""

    def __init__(self, model: DamoYolo) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: (B, 3, H, W) uint8 RGB. Returns the tensors in the order of OUTPUT_NAMES."""
        raw: RawPredictions = self.model(images.float())
        return (*raw.class_logits, *raw.distance_logits)


def as_predictions(outputs: Sequence[Tensor]) -> RawPredictions:
    """RawPredictions of the outputs of a file, given in the order of OUTPUT_NAMES."""
    levels = len(STRIDES)
    return RawPredictions(tuple(outputs[:levels]), tuple(outputs[levels:]))


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
