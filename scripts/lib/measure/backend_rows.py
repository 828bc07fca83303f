"""List the rows of the table of backends, and say which of them a machine can run.

Imports no torch, so that commands can build their parsers quickly.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class BackendRow:
    """One backend in one precision.

    device: "cpu" or "cuda". backend, precision: settings of the archive (ServingConfig).
    arithmetic: the precision shown in the table. quantised: the archive contains an INT8 file.
    """

    device: str
    backend: str
    precision: str
    arithmetic: str
    quantised: bool = False

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"{self.backend} {self.arithmetic}"


ROWS = (
    BackendRow("cpu", "pytorch", "fp32", "fp32"),
    BackendRow("cpu", "pytorch", "bf16", "bf16"),
    BackendRow("cpu", "onnxruntime", "fp32", "fp32"),
    BackendRow("cpu", "onnxruntime", "auto", "int8", quantised=True),
    BackendRow("cpu", "openvino", "fp32", "fp32"),
    BackendRow("cpu", "openvino", "bf16", "bf16"),
    BackendRow("cpu", "openvino", "fp32", "int8, rest fp32", quantised=True),
    BackendRow("cpu", "openvino", "bf16", "int8, rest bf16", quantised=True),
    BackendRow("cuda", "pytorch", "fp32", "fp32"),
    BackendRow("cuda", "pytorch", "tf32", "tf32"),
    BackendRow("cuda", "pytorch", "amp", "amp"),
    BackendRow("cuda", "pytorch", "fp16", "fp16"),
    BackendRow("cuda", "pytorch", "bf16", "bf16"),
    BackendRow("cuda", "onnxruntime", "fp32", "fp32"),
    BackendRow("cuda", "tensorrt", "fp32", "fp32"),
    BackendRow("cuda", "tensorrt", "fp16", "fp16"),
    BackendRow("cuda", "tensorrt", "auto", "int8", quantised=True),
)
# Modules needed to build and run an archive, the backend's own first.
LIBRARIES = {
    "pytorch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "onnx", "onnxscript"),
}


def rows_of(device: str) -> list[BackendRow]:
    """The rows of a device, in table order."""
    return [row for row in ROWS if row.device == device]


@dataclass(frozen=True)
class Machine:
    """What decides which rows can run."""

    has_gpu: bool
    libraries: frozenset[str]
    onnxruntime_has_cuda: bool
    cpu_computes_bf16: bool

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        import torch

        from damoyolo.backends.precision import cpu_computes_bf16

        wanted = {name for names in LIBRARIES.values() for name in names}
        found = frozenset(name for name in wanted if importlib.util.find_spec(name) is not None)
        on_cuda = False
        if torch.cuda.is_available() and "onnxruntime" in found:
            import onnxruntime

            on_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        return cls(torch.cuda.is_available(), found, on_cuda, cpu_computes_bf16())


def reason_not_run(row: BackendRow, machine: Machine, *, has_int8_file: bool) -> str | None:
    """Why a row cannot run on a machine, in a few words; None if it can."""
    if row.device == "cuda" and not machine.has_gpu:
        return "no GPU"
    for library in LIBRARIES[row.backend]:
        if library not in machine.libraries:
            return f"{library} not installed"
    if row.device == "cuda" and row.backend == "onnxruntime" and not machine.onnxruntime_has_cuda:
        return "onnxruntime without CUDA"
    if row.device == "cpu" and row.precision == "bf16" and not machine.cpu_computes_bf16:
        return "CPU without bfloat16"  # it could only be emulated, slowly
    if row.quantised and not has_int8_file:
        return "no INT8 file given"
    return None
