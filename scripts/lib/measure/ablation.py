"""The ladder of techniques for the network alone: each rung adds one to those below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from damoyolo.backends.pytorch import PyTorchBackend
from damoyolo.cuda.fuse import FuseOptions, fuse
from damoyolo.cuda.graphs import capture, capture_stream
from damoyolo.model.checkpoint import Checkpoint, load_checkpoint
from damoyolo.model.damoyolo import DamoYolo, build_model
from damoyolo.model.fold import fold_state_dict
from damoyolo.structures import RawPredictions

Network = Callable[[Tensor], RawPredictions]

# Each adds one rewrite to those before it.
FUSIONS_IN_ORDER = ("cudnn_epilogue", "merged_head", "pointwise", "pooling", "stem")
NO_FUSIONS = FuseOptions(**dict.fromkeys(FUSIONS_IN_ORDER, False))
# The rung that later ones are compared with: plain 16-bit PyTorch without launch gaps.
BASELINE = "fp16 channels-last, CUDA graph"


@dataclass(frozen=True)
class AblationStep:
    """One row of the ladder: a network made ready, and whether it is recorded as a CUDA graph."""

    name: str
    build: Callable[[], Network]
    graph: bool = False


def ablation_steps(
    weights: Path, num_classes: int, device: torch.device, *, compile_too: bool
) -> list[AblationStep]:
    """The ladder of the device; on a CPU the part of it that a CPU can climb."""
    checkpoint = load_checkpoint(weights, num_classes=num_classes)

    def plain(precision: str, *, folded: bool = False) -> Callable[[], Network]:
        return lambda: PyTorchBackend(_model(checkpoint, folded=folded), device, precision)

    def fused(options: FuseOptions) -> Callable[[], Network]:
        return lambda: fuse(_model(checkpoint, folded=True), options).to(device, torch.float16)

    if device.type != "cuda":
        return [
            AblationStep("float32", plain("fp32")),
            AblationStep("+ folding", plain("fp32", folded=True)),
            AblationStep("AMP (bf16), folded", plain("amp", folded=True)),
            AblationStep("bf16, folded", plain("bf16", folded=True)),
        ]
    ablation = [
        AblationStep("float32", plain("fp32")),
        AblationStep("TF32", plain("tf32")),
        AblationStep("AMP (fp16)", plain("amp")),
        AblationStep("fp16 channels-last", plain("fp16")),
        AblationStep(BASELINE, plain("fp16"), graph=True),
        AblationStep("+ folding", plain("fp16", folded=True), graph=True),
    ]
    options = NO_FUSIONS
    for name in FUSIONS_IN_ORDER:
        options = replace(options, **{name: True})
        ablation.append(AblationStep(f"+ {name.replace('_', ' ')}", fused(options), graph=True))
    if compile_too:
        ablation.append(
            AblationStep(
                "folding + torch.compile instead",
                lambda: _compiled(_model(checkpoint, folded=True), device),
                graph=True,
            )
        )
    return ablation


def flop_per_image(weights: Path, num_classes: int) -> int:
    """Floating-point operations of the folded network for one image of its variant's size.

    Those of convolutions, a multiplication and an addition counting as two.
    """
    variant = load_checkpoint(weights, num_classes=num_classes).variant
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes alone, no memory
        build_model(variant, num_classes, folded=True)(torch.empty(1, 3, *variant.input_size_hw))
    return int(counter.get_total_flops())


def _model(checkpoint: Checkpoint, *, folded: bool) -> DamoYolo:
    model = build_model(checkpoint.variant, checkpoint.num_classes, folded=folded)
    model.load_state_dict(fold_state_dict(checkpoint.state_dict) if folded else dict(checkpoint.state_dict))
    return model.requires_grad_(False)


class _CompiledNetwork(nn.Module):
    """A network behind the conversion of pixels, for the compiler to see as one."""

    def __init__(self, model: DamoYolo) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> RawPredictions:
        predictions: RawPredictions = self.model(pixels.to(torch.float16, memory_format=torch.channels_last))
        return predictions


def _compiled(model: DamoYolo, device: torch.device) -> Network:
    network = _CompiledNetwork(model).to(device, torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    compiled: Network = torch.compile(network)
    return compiled


def ready_calls(
    ablation: Sequence[AblationStep], pixels: Tensor
) -> Iterator[tuple[AblationStep, Callable[[], RawPredictions]]]:
    """A call for each rung that predicts for `pixels`; recorded where the rung says so."""
    for step in ablation:
        network = step.build()
        yield step, (_captured(network, pixels) if step.graph else _eager(network, pixels))


def _eager(network: Network, pixels: Tensor) -> Callable[[], RawPredictions]:
    def call() -> RawPredictions:
        with torch.inference_mode():
            return network(pixels)

    return call


@torch.inference_mode()
def _captured(network: Network, pixels: Tensor) -> Callable[[], RawPredictions]:
    with capture_stream(pixels.device, lambda: network(pixels)) as stream:
        graph, predictions = capture(lambda: network(pixels), stream)

    def replay(_weights: Network = network) -> RawPredictions:
        graph.replay()  # it holds addresses of the weights, so the network has to live as long
        return predictions

    return replay
