"""The ladder of techniques for the network alone: each rung adds one to those below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from damoyolo.backends.pytorch import PyTorchBackend
from damoyolo.cuda.fuse import RewriteOptions, rewrite
from damoyolo.cuda.pipeline import WARM_UP_RUNS, kernels_chosen_by_trial
from damoyolo.model.checkpoint import Checkpoint, load_checkpoint
from damoyolo.model.damoyolo import DamoYolo, build_model
from damoyolo.model.fold import fold_state_dict
from damoyolo.structures import RawPredictions

Network = Callable[[Tensor], RawPredictions]

# Each adds one rewrite to those before it.
REWRITES_IN_ORDER = ("cudnn_epilogue", "merged_head", "pointwise", "pooling", "stem")
NO_REWRITES = RewriteOptions(**dict.fromkeys(REWRITES_IN_ORDER, False))
# The rung that later ones are compared with: plain 16-bit PyTorch without launch gaps.
BASELINE = "fp16 channels-last, CUDA graph"


@dataclass(frozen=True)
class Rung:
    """One row of the ladder: a network made ready, and whether it is recorded as a CUDA graph."""

    name: str
    build: Callable[[], Network]
    graph: bool = False


def rungs(weights: Path, num_classes: int, device: torch.device, *, compile_too: bool) -> list[Rung]:
    """The ladder of the device; on a CPU the part of it that a CPU can climb."""
    checkpoint = load_checkpoint(weights, num_classes=num_classes)

    def plain(precision: str, *, folded: bool = False) -> Callable[[], Network]:
        return lambda: PyTorchBackend(_model(checkpoint, folded=folded), device, precision)

    def rewritten(options: RewriteOptions) -> Callable[[], Network]:
        return lambda: rewrite(_model(checkpoint, folded=True), options).to(device, torch.float16)

    if device.type != "cuda":
        return [
            Rung("float32", plain("fp32")),
            Rung("+ folding", plain("fp32", folded=True)),
            Rung("AMP (bf16), folded", plain("amp", folded=True)),
            Rung("bf16, folded", plain("bf16", folded=True)),
        ]
    ladder = [
        Rung("float32", plain("fp32")),
        Rung("TF32", plain("tf32")),
        Rung("AMP (fp16)", plain("amp")),
        Rung("fp16 channels-last", plain("fp16")),
        Rung(BASELINE, plain("fp16"), graph=True),
        Rung("+ folding", plain("fp16", folded=True), graph=True),
    ]
    options = NO_REWRITES
    for name in REWRITES_IN_ORDER:
        options = replace(options, **{name: True})
        ladder.append(Rung(f"+ {name.replace('_', ' ')}", rewritten(options), graph=True))
    if compile_too:
        ladder.append(
            Rung(
                "folding + torch.compile instead",
                lambda: _compiled(_model(checkpoint, folded=True), device),
                graph=True,
            )
        )
    return ladder


def flop_a_picture(weights: Path, num_classes: int) -> int:
    """Floating-point operations of the folded network for one picture of its variant's size.

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
    ladder: Sequence[Rung], pixels: Tensor
) -> Iterator[tuple[Rung, Callable[[], RawPredictions]]]:
    """A call for each rung that predicts for `pixels`; recorded where the rung says so."""
    for rung in ladder:
        network = rung.build()
        yield rung, (_recorded(network, pixels) if rung.graph else _eager(network, pixels))


def _eager(network: Network, pixels: Tensor) -> Callable[[], RawPredictions]:
    def call() -> RawPredictions:
        with torch.inference_mode():
            return network(pixels)

    return call


@torch.inference_mode()
def _recorded(network: Network, pixels: Tensor) -> Callable[[], RawPredictions]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), kernels_chosen_by_trial():
        for _ in range(WARM_UP_RUNS):
            network(pixels)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            predictions = network(pixels)
    torch.cuda.current_stream().wait_stream(stream)

    def replay(_weights: Network = network) -> RawPredictions:
        graph.replay()  # it holds addresses of the weights, so the network has to live as long
        return predictions

    return replay
