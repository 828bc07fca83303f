"""Build the network with one more technique at each step, to see what each technique gains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lib.accuracy.datasets import DetectionDataset
from lib.accuracy.parity import average_precision, compare_decoded
from lib.measure.timing import Call, interleaved_medians_s, synchronize

from damoyolo.backends.pytorch import PyTorchBackend
from damoyolo.boxes import decode_predictions
from damoyolo.cuda.fuse import FuseOptions, fuse
from damoyolo.cuda.graphs import capture, capture_stream
from damoyolo.detector import Detector
from damoyolo.model.checkpoint import Checkpoint, load_checkpoint
from damoyolo.model.damoyolo import DamoYolo, build_model
from damoyolo.model.fold import fold_state_dict
from damoyolo.pipeline import EagerPipeline
from damoyolo.structures import RawPredictions

Network = Callable[[Tensor], RawPredictions]
Row = dict[str, Any]

# Each step adds one fusion to those before it.
FUSIONS_IN_ORDER = (
    "cudnn_epilogue",
    "merged_head",
    "pointwise",
    "pooling",
    "stem",
    "channel_padding",
)
NO_FUSIONS = FuseOptions(**dict.fromkeys(FUSIONS_IN_ORDER, False))
# The step that the others are compared with: plain 16-bit PyTorch without launch gaps.
BASELINE = "fp16 channels-last, CUDA graph"


@dataclass(frozen=True)
class AblationStep:
    """A way to run the network. graph: whether it is captured as a CUDA graph."""

    name: str
    build: Callable[[], Network]
    graph: bool = False


def ablation_steps(
    weights: Path, num_classes: int, device: torch.device, *, compile_too: bool
) -> list[AblationStep]:
    """The steps for the device. weights: as trained. compile_too: add torch.compile (CUDA only)."""
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
    steps = [
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
        steps.append(AblationStep(f"+ {name.replace('_', ' ')}", fused(options), graph=True))
    if compile_too:
        steps.append(
            AblationStep(
                "folding + torch.compile instead",
                lambda: _compiled(_model(checkpoint, folded=True), device),
                graph=True,
            )
        )
    return steps


def measure_ablation(steps: Sequence[AblationStep], pixels: Tensor) -> list[Row]:
    """One row for each step, in order: times, memory, and differences from the first step.

    pixels: (B, 3, H, W) uint8 on the device. A step that runs out of memory has a "failure" and no figures.
    """
    device, batch_size = pixels.device, len(pixels)
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    reference: tuple[Tensor, Tensor] | None = None
    for step in steps:
        row = rows[step.name] = {"step": step.name, "batch_size": batch_size}
        try:
            call = _ready_call(step, pixels)
            peak_mib = _peak_mib(call, device)
            scores, boxes_xyxy = decode_predictions(RawPredictions(*map(tuple, call())))
        except torch.OutOfMemoryError:
            row["failure"] = "out of memory"
            torch.cuda.empty_cache()
            continue
        decoded = scores.cpu(), boxes_xyxy.cpu()
        reference = reference or decoded
        row |= {"peak_mib": peak_mib, **asdict(compare_decoded(decoded, reference))}
        calls[step.name] = call
    for name, seconds in interleaved_medians_s(calls, device).items():
        rows[name] |= {"ms": seconds * 1e3, "images_per_s": batch_size / seconds}
    if baseline_ms := rows.get(BASELINE, {}).get("ms"):
        for name in calls:
            rows[name]["times_baseline"] = baseline_ms / rows[name]["ms"]
    return list(rows.values())


def ap_of_network(network: Network, detector: Detector, dataset: DetectionDataset) -> float:
    """AP of a network in place of the detector's own, with the plain postprocessing."""
    changed = copy.copy(detector)
    backend = _NetworkBackend(network, detector.device)
    changed.pipeline = EagerPipeline(backend, detector.input_size_hw, detector.config.max_candidates)
    return average_precision(changed, dataset)


def flop_per_image(weights: Path, num_classes: int) -> int:
    """Floating-point operations of the folded network for one image of its variant's size.

    Counts the convolutions; a multiplication and an addition are two operations.
    """
    variant = load_checkpoint(weights, num_classes=num_classes).variant
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # only shapes, no memory
        build_model(variant, num_classes, folded=True)(torch.empty(1, 3, *variant.input_size_hw))
    return int(counter.get_total_flops())


@dataclass
class _NetworkBackend:
    network: Network
    device: torch.device
    name: str = "pytorch"
    precision: str = "fp16"

    def __call__(self, pixels: Tensor) -> RawPredictions:
        with torch.inference_mode():
            return RawPredictions(*map(tuple, self.network(pixels)))


def _peak_mib(call: Call, device: torch.device) -> float | None:
    """Peak memory in MiB of live tensors of this process on a CUDA device during one call.

    Includes weights of other networks that are alive, but not what a CUDA graph keeps in its memory pool.
    """
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def _model(checkpoint: Checkpoint, *, folded: bool) -> DamoYolo:
    model = build_model(checkpoint.variant, checkpoint.num_classes, folded=folded)
    model.load_state_dict(fold_state_dict(checkpoint.state_dict) if folded else dict(checkpoint.state_dict))
    return model.requires_grad_(False)


class _CompiledNetwork(nn.Module):
    """The conversion of pixels and the network, compiled as one."""

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


def _ready_call(step: AblationStep, pixels: Tensor) -> Callable[[], RawPredictions]:
    """Build the network of a step; a call that predicts for `pixels`, captured if the step says so.

    pixels: (B, 3, H, W) uint8 on the device.
    """
    network = step.build()
    return _captured(network, pixels) if step.graph else _eager(network, pixels)


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
        graph.replay()  # it holds addresses of the weights, so it must not outlive the network
        return predictions

    return replay
