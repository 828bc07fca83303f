"""What a TensorRT engine was built from, by and for, and the refusal of one that does not belong here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from damoyolo.backends.onnx_metadata import OnnxMetadata, metadata_of
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo

ENGINE_FILE = "damoyolo.plan"
METADATA_FILE = "damoyolo.plan.json"
METADATA_FORMAT = "damoyolo-tensorrt-1"
REBUILD_COMMAND = "python scripts/build_tensorrt.py --onnx FILE"


class BatchRange(NamedTuple):
    """Batch sizes, both included, that share an optimisation profile; tuned for the largest."""

    smallest: int
    largest: int


class Machine(NamedTuple):
    """What an engine is bound to: it runs on this GPU with this version of TensorRT only."""

    tensorrt_version: str
    gpu_name: str
    compute_capability: str  # major.minor


@dataclass(frozen=True)
class EngineMetadata:
    """Written beside an engine; an engine by itself tells its version at most.

    machine: where it was built. network: what the ONNX file said; precision is fp32, fp16 or int8.
    min_size_hw, max_size_hw: heights and widths that it takes, in pixels.
    batch_ranges: one an optimisation profile, ascending from batch size 1 without a gap.
    onnx_sha256, plan_sha256: digests of the file that it was built from and of the engine, in hexadecimal.
    """

    machine: Machine
    network: OnnxMetadata
    min_size_hw: tuple[int, int]
    max_size_hw: tuple[int, int]
    batch_ranges: tuple[BatchRange, ...]
    onnx_sha256: str
    plan_sha256: str

    def __post_init__(self) -> None:
        require_contiguous(self.batch_ranges)

    def to_json(self) -> str:
        """The text that `read_metadata` reads."""
        content = {
            "format": METADATA_FORMAT,
            **dataclasses.asdict(self),
            "machine": self.machine._asdict(),
            "network": self.network.to_metadata(),
        }
        return json.dumps(content, indent=2, ensure_ascii=False)

    def require_plan(self, plan: bytes) -> None:
        """Refuse bytes that are not the engine which this describes.

        Raises:
            ConfigError: with both digests.
        """
        found = hashlib.sha256(plan).hexdigest()
        if found != self.plan_sha256:
            raise ConfigError(
                f"{ENGINE_FILE} has SHA-256 {found}, {METADATA_FILE} says {self.plan_sha256}: it is damaged "
                f"or was exchanged; build the engine anew: {REBUILD_COMMAND}"
            )

    def require_machine(self, here: Machine) -> None:
        """Refuse to run anywhere but on the kind of machine that the engine was built on.

        Raises:
            ConfigError: with what differs, and the command that builds for this machine.
        """
        differences = [
            f"{name.replace('_', ' ')} {built}, here it is {found}"
            for name, built, found in zip(Machine._fields, self.machine, here, strict=True)
            if built != found
        ]
        if differences:
            raise ConfigError(
                f"the TensorRT engine was built for {'; '.join(differences)}. An engine runs on what it was "
                f"built for only. Build it anew on this machine: {REBUILD_COMMAND} (from the ONNX file with "
                f"SHA-256 {self.onnx_sha256}), or set backend to another"
            )

    def require_network(self, model: DamoYolo, config: ServingConfig, input_size_hw: tuple[int, int]) -> None:
        """Refuse an engine of another network than the settings speak of.

        model: of the archive, folded, on the CPU, in float32.

        Raises:
            ConfigError: with what differs.
        """
        expected = metadata_of(model, config.class_names)
        for name in ("variant", "class_names", "reg_max", "weights_digest"):
            found, wanted = getattr(self.network, name), getattr(expected, name)
            if found != wanted:
                raise ConfigError(
                    f"the TensorRT engine is of {name} {found}, settings and weights of the archive of "
                    f"{wanted}; build the engine anew: {REBUILD_COMMAND}"
                )
        if config.precision not in ("auto", self.network.precision):
            raise ConfigError(
                f"precision is {config.precision!r}, the TensorRT engine is {self.network.precision}; set "
                f"precision to auto, or build an engine of another (fp32, fp16; int8 from a quantised file): "
                f"{REBUILD_COMMAND}"
            )
        self.require_size(input_size_hw)

    def require_size(self, size_hw: tuple[int, int]) -> None:
        """Refuse a height or width, in pixels, that no optimisation profile covers.

        Raises:
            ConfigError: with what is accepted.
        """
        ranges = list(zip(self.min_size_hw, self.max_size_hw, strict=True))
        if not all(low <= side <= high for side, (low, high) in zip(size_hw, ranges, strict=True)):
            raise ConfigError(
                f"the network input is {list(size_hw)} (height, width); the TensorRT engine takes heights "
                f"{ranges[0][0]} to {ranges[0][1]} and widths {ranges[1][0]} to {ranges[1][1]}. Change "
                f"input_size_hw, or build the engine for this size: {REBUILD_COMMAND} --input-size HEIGHT "
                "WIDTH"
            )


def require_contiguous(ranges: Sequence[BatchRange]) -> None:
    """Refuse ranges that leave a batch size out, or hold one twice.

    Raises:
        ConfigError: with the ranges.
    """
    expected = 1
    for smallest, largest in ranges:
        if smallest != expected or largest < smallest:
            break
        expected = largest + 1
    else:
        if ranges:
            return
    found = ", ".join(f"{smallest}-{largest}" for smallest, largest in ranges) or "none"
    raise ConfigError(
        f"the batch ranges are {found}; accepted are ranges that ascend from 1 without a gap, say 1-1, 2-8, "
        "9-32"
    )


def read_metadata(path: Path) -> EngineMetadata:
    """The description beside an engine.

    Raises:
        ConfigError: the file is missing or not of this form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (found := content.pop("format")) != METADATA_FORMAT:
            raise ValueError(f"format {found!r}, accepted is {METADATA_FORMAT!r}")
        return EngineMetadata(
            machine=Machine(**content.pop("machine")),
            network=OnnxMetadata.from_metadata(content.pop("network"), path),
            min_size_hw=_size(content.pop("min_size_hw")),
            max_size_hw=_size(content.pop("max_size_hw")),
            batch_ranges=tuple(BatchRange(*each) for each in content.pop("batch_ranges")),
            **content,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path.name} does not describe a TensorRT engine ({type(error).__name__}: {error}); build the "
            f"engine anew: {REBUILD_COMMAND}"
        ) from error


def _size(sides: Sequence[int]) -> tuple[int, int]:
    height, width = sides
    return int(height), int(width)
