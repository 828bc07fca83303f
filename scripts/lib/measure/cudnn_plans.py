"""Convolutions as graphs of NVIDIA's `cudnn` package (nvidia-cudnn-frontend): all plans, all epilogues, INT8.

PyTorch reaches few of cuDNN's fused convolutions: no INT8, no addition after the activation, and only plans
of one heuristic. Here they are measured; the server does not use them, because building a plan takes about
half a second.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Addend = Literal["none", "before", "after"]


@dataclass(frozen=True)
class ConvSpec:
    """A convolution with its epilogue: activation(convolution * scale + bias + addend), or + addend after it.

    height, width: of the input. Padded to keep the size at stride 1; channels_last tensors throughout.
    in_type, out_type: fp16, bf16 or int8 of input and weight, and of the output. An int8 input is summed in
        int32 and multiplied by a scale per output channel; an int8 output is rounded and saturated.
    addend: what is added before or after the activation, in `addend_type`; an int8 one is multiplied by a
        scale.
    """

    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel_size: int
    stride: int
    in_type: torch.dtype
    out_type: torch.dtype
    relu: bool = True
    addend: Addend = "none"
    addend_type: torch.dtype = torch.float16

    @property
    def out_height(self) -> int:
        """Of the output."""
        return (self.height - 1) // self.stride + 1

    @property
    def out_width(self) -> int:
        """Of the output."""
        return (self.width - 1) // self.stride + 1

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(B, C, H, W)."""
        return self.batch, self.in_channels, self.height, self.width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(O, C, k, k)."""
        return self.out_channels, self.in_channels, self.kernel_size, self.kernel_size

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(B, O, H', W')."""
        return self.batch, self.out_channels, self.out_height, self.out_width


def load_cudnn() -> Any:
    """The package `cudnn`.

    Raises:
        ImportError: it, or the cuDNN that it loads, is not installed.
    """
    import cudnn

    return cudnn


@functools.cache
def _handle(device_index: int) -> Any:
    """One cuDNN handle for each device of this process."""
    with torch.cuda.device(device_index):
        return load_cudnn().create_handle()


class ConvGraph:
    """The plans of cuDNN for one convolution on a device, of which one is built and run at a time.

    bias_type: fp16 selects the kernels that cuDNN ships compiled, where it has any; float32 those that it
        compiles when a plan is built. INT8 needs float32.

    Raises:
        ImportError: the package is not installed.
        cudnn.cudnnGraphNotSupportedError: cuDNN has no kernel.
    """

    def __init__(
        self, spec: ConvSpec, device: torch.device, bias_type: torch.dtype = torch.float32, modes: str = "ABF"
    ) -> None:
        cudnn = load_cudnn()
        self.spec = spec
        self.device = device
        self.bias_type = bias_type
        self._cudnn = cudnn
        self._handle = _handle(device.index or 0)
        self._types: Mapping[torch.dtype, Any] = {
            torch.float16: cudnn.data_type.HALF,
            torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float32: cudnn.data_type.FLOAT,
            torch.int8: cudnn.data_type.INT8,
        }
        self._graph = cudnn.pygraph(
            io_data_type=self._types[spec.in_type],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self._handle,
        )
        self._tensors: dict[str, Any] = {}
        self._describe()
        self._graph.validate()
        self._graph.build_operation_graph()
        heuristics = {"A": cudnn.heur_mode.A, "B": cudnn.heur_mode.B, "F": cudnn.heur_mode.FALLBACK}
        self._graph.create_execution_plans([heuristics[mode] for mode in modes])
        self.plan_count = int(self._graph.get_execution_plan_count())

    def _tensor(self, name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Any:
        """An input of the graph, channels_last."""
        _, C, H, W = shape
        strides = [C * H * W, 1, C * W, C]
        tensor = self._graph.tensor(name=name, dim=list(shape), stride=strides, data_type=self._types[dtype])
        self._tensors[name] = tensor
        return tensor

    def _describe(self) -> None:
        """Put the operations of the convolution into the graph."""
        spec, graph = self.spec, self._graph
        is_int8 = spec.in_type == torch.int8
        per_channel = (1, spec.out_channels, 1, 1)
        accumulator = self._cudnn.data_type.INT32 if is_int8 else self._cudnn.data_type.FLOAT
        y = graph.conv_fprop(
            image=self._tensor("x", spec.input_shape, spec.in_type),
            weight=self._tensor("weight", spec.weight_shape, spec.in_type),
            padding=[spec.kernel_size // 2] * 2,
            stride=[spec.stride] * 2,
            dilation=[1, 1],
            compute_data_type=accumulator,
        )
        if is_int8:
            y = graph.scale(input=y, scale=self._tensor("scale", per_channel, torch.float32))
        addend = None
        if spec.addend != "none":
            addend = self._tensor("addend", spec.output_shape, spec.addend_type)
            if spec.addend_type == torch.int8:
                addend = graph.mul(a=addend, b=self._tensor("addend_scale", (1, 1, 1, 1), torch.float32))
        if spec.addend == "before":  # before the bias: the order of the kernels that are shipped compiled
            y = graph.add(a=y, b=addend)
        y = graph.bias(input=y, bias=self._tensor("bias", per_channel, self.bias_type))
        if spec.relu:
            y = graph.relu(input=y)
        if spec.addend == "after":
            y = graph.add(a=y, b=addend)
        y.set_output(True).set_data_type(self._types[spec.out_type])
        self._tensors["out"] = y

    def plan_name(self, index: int) -> str:
        """The engine and its parameters."""
        return str(self._graph.get_plan_name_at_index(index))

    def build(self, index: int) -> int:
        """Make a plan ready to run; the bytes of workspace it needs.

        Raises:
            cudnn.cudnnGraphNotSupportedError, RuntimeError: it cannot run on this device.
        """
        self._graph.build_plan_at_index(index)
        return int(self._graph.get_workspace_size_plan_at_index(index))

    def run(self, index: int, tensors: Mapping[str, Tensor], workspace: Tensor) -> None:
        """Enqueue a built plan on the current stream; can be captured.

        tensors: x, weight, bias, out and, where the specification has them, scale, addend, addend_scale.
            Their shapes, layouts and types are those of the specification, unchecked.
        """
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream(self.device).cuda_stream)
        pack = {tensor: tensors[name] for name, tensor in self._tensors.items()}
        self._graph.execute_plan_at_index(pack, workspace, index, handle=self._handle)


def random_tensors(
    spec: ConvSpec, device: torch.device, generator: torch.Generator, bias_type: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Tensors for `ConvGraph.run`, with values as in a network: outputs of about the range of their type."""
    terms = spec.in_channels * spec.kernel_size**2

    def draw(shape: tuple[int, ...], dtype: torch.dtype, deviation: float) -> Tensor:
        memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        values = torch.randn(shape, generator=generator, device=device) * deviation
        if dtype == torch.int8:
            values = values.round_().clamp_(-127, 127)
        return values.to(dtype).contiguous(memory_format=memory_format)

    is_int8 = spec.in_type == torch.int8
    per_channel = (1, spec.out_channels, 1, 1)
    out_deviation = 40.0 if spec.out_type == torch.int8 else 1.0
    tensors = {
        "x": draw(spec.input_shape, spec.in_type, 40.0 if is_int8 else 1.0).relu_(),
        "weight": draw(spec.weight_shape, spec.in_type, 40.0 if is_int8 else terms**-0.5 * out_deviation),
        "bias": draw(per_channel, bias_type, out_deviation / 4),
        "out": torch.empty(spec.output_shape, dtype=spec.out_type, device=device).to(
            memory_format=torch.channels_last
        ),
    }
    if is_int8:
        scale = out_deviation / (40.0 * 40.0 * terms**0.5)
        tensors["scale"] = draw(per_channel, torch.float32, 0.1).add_(1.0).mul_(scale)
    if spec.addend != "none":
        addend_is_int8 = spec.addend_type == torch.int8
        tensors["addend"] = draw(spec.output_shape, spec.addend_type, 40.0 if addend_is_int8 else 1.0)
        if addend_is_int8:
            tensors["addend_scale"] = torch.full((1, 1, 1, 1), out_deviation / 40.0, device=device)
    return tensors


def conv_reference(spec: ConvSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a graph computes, in float32 of plain PyTorch; an int8 output rounded to even and saturated.

    Sums of int8 products are exact while they stay below 2**24.
    """
    x, weight = tensors["x"].float(), tensors["weight"].float()
    y = torch.nn.functional.conv2d(x, weight, None, spec.stride, spec.kernel_size // 2)
    if "scale" in tensors:
        y = y * tensors["scale"]
    addend = None
    if spec.addend != "none":
        addend = tensors["addend"].float()
        if "addend_scale" in tensors:
            addend = addend * tensors["addend_scale"]
    if addend is not None and spec.addend == "before":
        y = y + addend
    y = y + tensors["bias"].float()
    if spec.relu:
        y = torch.relu(y)
    if addend is not None and spec.addend == "after":
        y = y + addend
    if spec.out_type == torch.int8:
        y = y.round().clamp(-128, 127)
    return y.to(spec.out_type)
