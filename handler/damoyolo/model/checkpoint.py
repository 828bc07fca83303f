"""Read checkpoints as trained (the official form); write and read the packaged, folded form of an archive."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from damoyolo.errors import CheckpointError
from damoyolo.model.damoyolo import DamoYolo, build_model
from damoyolo.model.fold import fold_state_dict
from damoyolo.model.variants import VARIANTS, VariantSpec, get_variant

PACKAGED_FORMAT = "damoyolo-folded-1"
MODULE_PREFIX = "module."  # in front of every key where a DistributedDataParallel wrapper was saved
CLASS_LAYERS = "head.gfl_cls."
CLASS_BIAS = "head.gfl_cls.0.bias"
KEYS_NAMED = 3  # of each kind of difference in an error message

StateDict = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """Weights as trained, and the network that they fit.

    state_dict: keys and order of `build_model(variant, num_classes)`, contiguous, float32 (counters int64).
    """

    state_dict: StateDict
    variant: VariantSpec
    num_classes: int


@dataclass(frozen=True)
class _Differences:
    """How a state dict differs from the one that a network expects."""

    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.misshaped)

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.misshaped}
        return "; ".join(f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in kinds.items() if keys)


def load_checkpoint(
    path: str | Path, variant: str | None = None, num_classes: int | None = None
) -> Checkpoint:
    """Read weights as trained: `{"model": state dict}` or a bare state dict, of any floating-point type.

    variant: name of the network; None finds it by the keys and shapes.
    num_classes: how many class names there are; None takes as many as the file has class channels. Where
        the file has one more, the last is the unused extra channel of older DAMO-YOLO heads and is cut off;
        the file alone cannot tell that channel from a class.

    Raises:
        CheckpointError: the file cannot be read safely, does not fit, or holds values that are not finite.
        ConfigError: there is no variant of that name.
    """
    wanted = None if variant is None else get_variant(variant)
    state_dict = _state_dict_in(path, _read(path))
    class_bias = state_dict.get(CLASS_BIAS)
    class_channels = class_bias.numel() if class_bias is not None else 0
    differences = {
        name: _compare(state_dict, _expected_shapes(name, max(class_channels, 1), folded=False))
        for name in VARIANTS
    }
    spec = _choose_variant(path, wanted, differences)
    ordered = {
        name: _as_stored(state_dict[name])
        for name in _expected_shapes(spec.name, class_channels, folded=False)
    }
    if num_classes is None:
        num_classes = class_channels
    if class_channels == num_classes + 1 > 1:
        ordered = _without_extra_class(ordered)
    elif class_channels != num_classes:
        raise CheckpointError(
            f"{path} has {class_channels} class channels, but {num_classes} class names are given; accepted "
            f"are {class_channels} names, or {class_channels - 1} if the last channel is the unused one of "
            "older heads: change the class names"
        )
    _require_finite(path, ordered)
    return Checkpoint(ordered, spec, num_classes)


def save_packaged(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write the folded form of a checkpoint; equal checkpoints give equal bytes, whatever the path.

    Raises:
        CheckpointError: the folded values are not finite.
    """
    folded = fold_state_dict(checkpoint.state_dict)
    _require_finite(path, folded)
    content = {
        "format": PACKAGED_FORMAT,
        "variant": checkpoint.variant.name,
        "num_classes": checkpoint.num_classes,
        "model": folded,
    }
    buffer = io.BytesIO()  # saved to a path, the file would carry its own name inside
    torch.save(content, buffer)
    Path(path).write_bytes(buffer.getbuffer())


def load_packaged(path: str | Path) -> DamoYolo:
    """Read what `save_packaged` wrote.

    Returns:
        The folded network on the CPU in float32, in evaluation mode, without gradients.

    Raises:
        CheckpointError: the file cannot be read safely, is of another form, or holds values that are not
            finite.
    """
    content = _read(path)
    if not isinstance(content, dict) or content.get("format") != PACKAGED_FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} is not in the packaged form (found {found!r}, accepted is {PACKAGED_FORMAT!r}); rebuild "
            "the archive from a checkpoint as trained"
        )
    name, num_classes = content.get("variant"), content.get("num_classes")
    spec = VARIANTS.get(name) if isinstance(name, str) else None
    if spec is None or not isinstance(num_classes, int) or num_classes < 1:
        raise CheckpointError(
            f"{path} says variant {name!r} with {num_classes!r} classes; accepted are the variants "
            f"{', '.join(VARIANTS)} and at least one class"
        )
    state_dict = _require_state_dict(path, content.get("model"))
    differences = _compare(state_dict, _expected_shapes(spec.name, num_classes, folded=True))
    if differences:
        raise CheckpointError(
            f"{path} does not hold the folded variant {spec.name} that it claims: {differences}"
        )
    _require_finite(path, state_dict)
    model = _without_values(spec, num_classes, folded=True).to_empty(device="cpu")
    model.load_state_dict(state_dict)
    return model.requires_grad_(False)


def _read(path: str | Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read safely: it is damaged, no checkpoint, or holds Python objects beside "
            "tensors and plain values; accepted is what torch.save writes for a state dict"
        ) from error
    except Exception as error:  # torch does not document what its reader raises for damaged files
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}); accepted is what torch.save "
            "writes for a state dict"
        ) from error


def _state_dict_in(path: str | Path, content: Any) -> dict[str, Tensor]:
    """The state dict of the official or bare form, without the prefix of a wrapper."""
    if isinstance(content, Mapping) and content.get("format") == PACKAGED_FORMAT:
        raise CheckpointError(f"{path} is in the packaged form; accepted is a checkpoint as trained")
    if isinstance(content, Mapping) and "model" in content:
        content = content["model"]
    state_dict = _require_state_dict(path, content)
    return {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in state_dict.items()}


def _require_state_dict(path: str | Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path} holds {type(content).__name__ if content or content is None else 'nothing'}; accepted "
            'are a state dict and {"model": state dict}'
        )
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path} holds {type(tensor).__name__} under {name!r}; a state dict has tensors only"
            )
    return dict(content)


def _choose_variant(
    path: str | Path, wanted: VariantSpec | None, differences: Mapping[str, _Differences]
) -> VariantSpec:
    fitting = [name for name, difference in differences.items() if not difference]
    if wanted is None and fitting:
        return VARIANTS[fitting[0]]
    if wanted is not None and wanted.name in fitting:
        return wanted
    if wanted is not None:
        hint = f"it fits variant {fitting[0]}" if fitting else "nor does it fit any other variant"
        raise CheckpointError(
            f"{path} does not fit variant {wanted.name} ({differences[wanted.name]}); {hint}"
        )
    closest = min(differences, key=lambda name: len(differences[name]))
    raise CheckpointError(
        f"{path} fits none of the variants {', '.join(VARIANTS)}; the closest is {closest} "
        f"({differences[closest]})"
    )


def _compare(state_dict: StateDict, expected: Shapes) -> _Differences:
    return _Differences(
        missing=[name for name in expected if name not in state_dict],
        unexpected=[name for name in state_dict if name not in expected],
        misshaped=[
            f"{name} {tuple(state_dict[name].shape)} instead of {shape}"
            for name, shape in expected.items()
            if name in state_dict and state_dict[name].shape != shape
        ],
    )


@functools.cache
def _expected_shapes(variant_name: str, num_classes: int, *, folded: bool) -> Shapes:
    model = _without_values(VARIANTS[variant_name], num_classes, folded=folded)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _without_values(variant: VariantSpec, num_classes: int, *, folded: bool) -> DamoYolo:
    """The network on the meta device: no time is spent on values that are replaced or never read."""
    with torch.device("meta"):
        return build_model(variant, num_classes, folded=folded)


def _as_stored(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def _without_extra_class(state_dict: StateDict) -> dict[str, Tensor]:
    return {
        name: tensor[:-1].contiguous() if name.startswith(CLASS_LAYERS) else tensor
        for name, tensor in state_dict.items()
    }


def _require_finite(path: str | Path, state_dict: StateDict) -> None:
    broken = [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(
            f"{path}: {len(broken)} tensors are not finite: {_first(broken)}; the weights are unusable, "
            "take another checkpoint"
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:KEYS_NAMED]) + (", ..." if len(names) > KEYS_NAMED else "")
