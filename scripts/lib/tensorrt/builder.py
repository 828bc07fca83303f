"""Build a TensorRT engine (10.x or 11.x) and its metadata from an ONNX file of the network.

Networks are strongly typed: the types in the ONNX file are the types of the engine, so fp16 comes from a
float16 file and int8 from quantisation nodes in the file. TensorRT's own choice of types (BuilderFlag.FP16,
BuilderFlag.INT8, calibrators) was deprecated in 10.12 and removed in 11.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from lib.cli import ScriptError
from lib.onnx.export import read_onnx_metadata

from damoyolo.backends.onnx_metadata import INPUT_NAME, OnnxMetadata
from damoyolo.backends.tensorrt import EngineMetadata, Gpu, import_tensorrt, machine_of


@dataclass(frozen=True)
class OnnxNetwork:
    """A network in the precision of the engine to be built.

    content: an ONNX model. sha256: of the file that it comes from, in hexadecimal.
    metadata: of that file, with the precision of `content`.
    """

    content: bytes
    sha256: str
    metadata: OnnxMetadata


def read_network(path: Path, precision: str | None = None) -> OnnxNetwork:
    """An ONNX file in a precision; None keeps that of the file.

    Raises:
        ConfigError: the file cannot be read, or is not one of this project.
        ScriptError: its outputs are not the raw predictions, or it cannot be converted to the precision.
    """
    metadata = read_onnx_metadata(path)
    if metadata.form != "raw":
        raise ScriptError(
            f"{path} has the outputs {metadata.form!r}; accepted are raw predictions: "
            "python scripts/export_onnx.py --outputs raw"
        )
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if precision in (None, metadata.precision):
        return OnnxNetwork(content, sha256, metadata)
    if (metadata.precision, precision) != ("fp32", "fp16"):
        raise ScriptError(
            f"{path} is of precision {metadata.precision}, requested is {precision}; a float32 file gives "
            "fp32 and fp16, an int8 engine needs a quantised file"
        )
    half = to_float16(onnx.load_model_from_string(content))
    return OnnxNetwork(half.SerializeToString(), sha256, dataclasses.replace(metadata, precision="fp16"))


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network in float16, with its input in uint8 and its outputs in float32; `model` is taken over."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        # Weights below the smallest float16 are rounded.
        warnings.filterwarnings("ignore", message="the float32 number")
        half: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True)
    return half


def build_engine(
    network: OnnxNetwork, gpu: Gpu, input_size_hw: tuple[int, int], batch_sizes: Sequence[int]
) -> tuple[bytes, EngineMetadata]:
    """The engine and its metadata. Takes minutes, in which the GPU has to be idle for kernels to be timed.

    input_size_hw: height and width of the network input, in pixels.
    batch_sizes: the largest of each optimisation profile, for which it is tuned; ascending.

    Raises:
        ConfigError: TensorRT is missing.
        ScriptError: the sizes do not fit, or TensorRT fails.
    """
    if sorted(set(batch_sizes)) != list(batch_sizes):
        raise ScriptError(f"the largest batch sizes are {list(batch_sizes)}; accepted are ascending ones")
    if any(side % 32 for side in input_size_hw):
        raise ScriptError(f"the input size is {list(input_size_hw)}; accepted are multiples of 32, in pixels")
    trt = import_tensorrt()
    logger = trt.Logger(trt.Logger.WARNING)
    with gpu.selected():
        builder = trt.Builder(logger)
        # Version 11 is always strongly typed, 10 only on request.
        definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(definition, logger)
        if not parser.parse(network.content):
            errors = [_text_of(parser.get_error(index)) for index in range(parser.num_errors)]
            raise ScriptError(
                f"TensorRT {trt.__version__} cannot read the ONNX file: {'; '.join(errors)}. A "
                "quantised file has to come from scripts/quantize.py --for tensorrt"
            )
        config = builder.create_builder_config()
        if network.metadata.precision == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)  # on by default
        for before, largest in zip((0, *batch_sizes), batch_sizes, strict=False):
            profile = builder.create_optimization_profile()
            counts = before + 1, largest, largest
            profile.set_shape(INPUT_NAME, *((count, 3, *input_size_hw) for count in counts))
            if config.add_optimization_profile(profile) < 0:
                raise ScriptError(
                    f"TensorRT refused the profile of batch sizes {before + 1} to {largest}; its own log "
                    "lines above say why"
                )
        built = builder.build_serialized_network(definition, config)
        if built is None:
            raise ScriptError(
                f"TensorRT {trt.__version__} built no engine; its own log lines above say why. A smaller "
                "largest batch may help"
            )
    plan = bytes(built)
    return plan, EngineMetadata(
        machine=machine_of(gpu, trt),
        network=network.metadata,
        input_size_hw=input_size_hw,
        batch_sizes=tuple(batch_sizes),
        onnx_sha256=network.sha256,
        plan_sha256=hashlib.sha256(plan).hexdigest(),
    )


def _text_of(error: Any) -> str:
    return f"{error.desc()} (node {error.node_name() or error.node()}, {error.node_operator()})"
