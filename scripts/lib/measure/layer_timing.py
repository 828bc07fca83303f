"""Time the ways to run one layer on a CUDA device; calls are captured, so that no launch is waited for."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib.measure.cudnn_plans import ConvGraph, ConvSpec, conv_reference, random_tensors
from lib.measure.layers import Pointwise, Stem, Work, describe

from damoyolo.cuda.graphs import capture, capture_stream
from damoyolo.cuda.kernels.pointwise import pointwise_conv
from damoyolo.cuda.kernels.stem import focus_stem
from damoyolo.cuda.startup_lock import exclusive_device_lock

REPLAY_US = 2000.0  # of one replay of a captured sequence of calls
REPLAYS = 5
# A plan that is slower than the best by more than this in a first look is not timed again.
SCREENING = 1.3
Row = dict[str, Any]
# Rows, columns, depth, warps, stages.
POINTWISE_TILES = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 256, 64, 8, 3),
    (128, 128, 32, 4, 5),
)


@dataclass(frozen=True)
class Variant:
    """A way to run a layer.

    layer: the layer's name. work: what is run.
    kind: "served", "padded", "tiles" (of `kernels.pointwise`), "plans" (all of cuDNN's).
    """

    layer: str
    kind: str
    work: Work

    @property
    def name(self) -> str:
        """Unique among the variants of a layer."""
        types = ""
        if isinstance(self.work, ConvSpec) and self.kind == "plans":
            types = (
                "->".join(str(t).removeprefix("torch.") for t in (self.work.in_type, self.work.out_type))
                + " "
            )
        return f"{self.kind}: {types}{describe(self.work)}"


def variants_of(work: Work) -> Iterator[Variant]:
    """The ways to run a layer, those that matter most first."""
    layer = describe(work)
    yield Variant(layer, "served", work)
    if isinstance(work, Stem):
        return
    if isinstance(work, Pointwise):
        yield Variant(layer, "tiles", work)
    conv = work.as_conv() if isinstance(work, Pointwise) else work
    padded = {multiple: padded_channels(conv, multiple) for multiple in (16, 32, 64)}
    for spec in dict.fromkeys(padded.values()):
        if spec != conv:
            yield Variant(layer, "padded", spec)
    wide = dict.fromkeys([padded[32], padded[16]])
    # cuDNN's plans for a concatenation are a bound of what a kernel for several inputs may reach.
    for spec in wide:
        for out_type in (torch.int8, torch.float16):
            addend_type = torch.int8 if out_type == torch.int8 else torch.float16
            quantised = dataclasses.replace(
                spec, in_type=torch.int8, out_type=out_type, addend_type=addend_type
            )
            yield Variant(layer, "plans", quantised)
    for spec in wide:
        yield Variant(layer, "plans", spec)


def padded_channels(spec: ConvSpec, multiple: int) -> ConvSpec:
    """The convolution with input and output channels padded to a multiple."""
    return dataclasses.replace(
        spec,
        in_channels=spec.in_channels + -spec.in_channels % multiple,
        out_channels=spec.out_channels + -spec.out_channels % multiple,
    )


@torch.inference_mode()
def time_variant(variant: Variant, device: torch.device, plan_modes: str = "ABF") -> Row:
    """Microseconds of a variant, as a row; the device is locked while it runs, not while plans compile."""
    generator = torch.Generator(device).manual_seed(0)
    row: Row = {"layer": variant.layer, "kind": variant.kind, "variant": variant.name}
    if variant.kind == "plans":
        assert isinstance(variant.work, ConvSpec)
        return row | time_plans(variant.work, device, generator, plan_modes)
    if variant.kind == "tiles":
        assert isinstance(variant.work, Pointwise)
        return row | time_pointwise_tiles(variant.work, device, generator)
    call = served_call(variant.work, device, generator)
    with exclusive_device_lock(device):
        return row | {"us": graph_time_us(call, device)}


def served_call(work: Work, device: torch.device, generator: torch.Generator) -> Callable[[], object]:
    """The call that a fused network makes in fp16, on random tensors."""

    def draw(*shape: int, deviation: float = 1.0) -> Tensor:
        memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        values = torch.randn(shape, generator=generator, device=device) * deviation
        return values.to(torch.float16).contiguous(memory_format=memory_format)

    if isinstance(work, Stem):
        shape = (work.batch, work.height, work.width, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
        weight, bias = draw(work.channels, 3, 6, 6, deviation=1e-3), draw(work.channels)
        point = draw(work.point_channels, work.channels, deviation=0.2) if work.point_channels else None
        point_bias = draw(work.point_channels) if work.point_channels else None
        return lambda: focus_stem(
            pixels.permute(0, 3, 1, 2), weight, bias, point, point_bias, torch.float16, work.activation
        )
    if isinstance(work, Pointwise):
        return functools.partial(pointwise_conv, *pointwise_arguments(work, device, generator))
    return _conv_call(work, draw)


def pointwise_arguments(
    work: Pointwise, device: torch.device, generator: torch.Generator
) -> tuple[list[Tensor], Tensor, Tensor, Any, tuple[bool, ...], tuple[int, ...]]:
    """Random arguments of `pointwise_conv`, in fp16."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(torch.float16)

    inputs = [draw(work.batch, *shape).contiguous(memory_format=torch.channels_last) for shape in work.inputs]
    channels = sum(shape[0] for shape in work.inputs)
    weight = draw(sum(work.out_channels), channels) * channels**-0.5
    bias = draw(sum(work.out_channels))
    return inputs, weight, bias, work.activation, work.upsampled, work.out_channels


def _conv_call(spec: ConvSpec, draw: Callable[..., Tensor]) -> Callable[[], object]:
    x, bias = draw(*spec.input_shape).relu_(), draw(spec.out_channels)
    weight = draw(*spec.weight_shape, deviation=(spec.in_channels * spec.kernel_size**2) ** -0.5)
    addend = draw(*spec.output_shape) if spec.addend != "none" else None
    padding = spec.kernel_size // 2
    geometry = ((spec.stride,) * 2, (padding,) * 2, (1, 1), 1)
    ops = torch.ops.aten
    if not spec.relu:
        return lambda: torch.nn.functional.conv2d(x, weight, bias, spec.stride, padding)
    if addend is not None and spec.addend == "before":
        return lambda: ops.cudnn_convolution_add_relu(x, weight, addend, 1.0, bias, *geometry)
    if addend is not None:
        return lambda: ops.cudnn_convolution_relu(x, weight, bias, *geometry).add_(addend)
    return lambda: ops.cudnn_convolution_relu(x, weight, bias, *geometry)


def time_pointwise_tiles(work: Pointwise, device: torch.device, generator: torch.Generator) -> Row:
    """The fastest tile of the kernel for 1x1 convolutions, which by itself takes a fixed choice."""
    from damoyolo.cuda.kernels import pointwise_triton

    arguments = pointwise_arguments(work, device, generator)
    times: dict[str, float] = {}
    errors = []
    for tile in POINTWISE_TILES:
        call = functools.partial(
            pointwise_triton.pointwise_conv, *arguments, tile=pointwise_triton.Tile(*tile)
        )
        try:
            call()  # compiles
            with exclusive_device_lock(device):
                times[str(tile)] = graph_time_us(call, device)
        except Exception as error:  # the compiler's own types; other tiles remain
            errors.append(f"{tile}: {type(error).__name__}")
    if not times:
        return {"error": "; ".join(errors)}
    fastest = min(times, key=lambda name: times[name])
    return {"us": times[fastest], "tile": fastest, "times": times, "failed": errors}


def time_plans(spec: ConvSpec, device: torch.device, generator: torch.Generator, modes: str) -> Row:
    """The fastest of cuDNN's plans for a convolution, and how far its result is from plain PyTorch's."""
    rows: list[Row] = []
    bias_types = [torch.float32]
    if spec.in_type != torch.int8 and spec.addend != "after":
        bias_types.append(torch.float16)
    errors = []
    for bias_type in bias_types:
        try:
            graph = ConvGraph(spec, device, bias_type, modes)
            rows.append(_best_plan(graph, random_tensors(spec, device, generator, bias_type)))
        except Exception as error:  # cuDNN's own types; a form without plans leaves the others
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    if not rows:
        return {"error": "; ".join(errors)}
    return min(rows, key=lambda row: float(row.get("us", float("inf")))) | {
        "plans": sum(row["plans"] for row in rows),
        "failed_plans": sum(row["failed_plans"] for row in rows),
    }


def _best_plan(graph: ConvGraph, tensors: dict[str, Tensor]) -> Row:
    best: Row = {}
    failed = 0
    seen = set()
    for index in range(graph.plan_count):
        if graph.plan_name(index) in seen:  # the heuristics overlap
            continue
        seen.add(graph.plan_name(index))
        try:
            workspace = torch.empty(max(1, graph.build(index)), dtype=torch.uint8, device=graph.device)
            with exclusive_device_lock(graph.device):
                us = _plan_time_us(graph, index, tensors, workspace, best.get("us"))
        except Exception:  # cuDNN's own types; other plans remain
            failed += 1
            continue
        if us is not None and us < best.get("us", float("inf")):
            best = {"us": us, "plan": graph.plan_name(index), "index": index, "workspace": workspace.numel()}
    if best:
        with exclusive_device_lock(graph.device):
            workspace = torch.empty(best["workspace"], dtype=torch.uint8, device=graph.device)
            tensors["out"].fill_(77)
            graph.run(best["index"], tensors, workspace)
            found, expected = tensors["out"].float(), conv_reference(graph.spec, tensors).float()
            best["largest_difference"] = float((found - expected).abs().max())
            best["largest_value"] = float(expected.abs().max())
    return best | {"plans": len(seen), "failed_plans": failed, "bias": str(graph.bias_type)}


def _plan_time_us(
    graph: ConvGraph, index: int, tensors: dict[str, Tensor], workspace: Tensor, best_us: float | None
) -> float | None:
    """Microseconds of a built plan; None if a first look shows that it is not the fastest."""

    def call() -> None:
        graph.run(index, tensors, workspace)

    start, end = (_event() for _ in range(2))
    call()
    start.record()
    for _ in range(5):
        call()
    end.record()
    end.synchronize()
    first_look_us = start.elapsed_time(end) * 1e3 / 5
    # Launches from Python take up to about 50 us each and hide what is faster.
    if best_us is not None and first_look_us > max(SCREENING * best_us, 80.0):
        return None
    return graph_time_us(call, graph.device)


def graph_time_us(call: Callable[[], object], device: torch.device) -> float:
    """Median microseconds of a call, from replays of a CUDA graph with many of them."""
    start, end = (_event() for _ in range(2))
    with capture_stream(device, call) as stream:
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        calls = min(50, max(3, int(REPLAY_US / max(1.0, start.elapsed_time(end) * 1e3))))

        def sequence() -> None:
            for _ in range(calls):
                call()

        graph, _ = capture(sequence, stream)
        samples = []
        graph.replay()
        for _ in range(REPLAYS):
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / calls)
    return float(statistics.median(samples))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
