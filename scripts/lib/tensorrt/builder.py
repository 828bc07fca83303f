"""From an ONNX file of the network to a TensorRT engine and its description (TensorRT 10.x or 11.x).

Every network is strongly typed: the types in the ONNX file are the types of the engine, so that float16 comes
from a float16 file and int8 from quantisation nodes in the file. Letting TensorRT choose (BuilderFlag.FP16,
BuilderFlag.INT8, calibrators) was deprecated in 10.12 and is gone in 11.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from damoyolo.backends.onnx_metadata import INPUT_NAME, OUTPUT_NAMES, OnnxMetadata
from damoyolo.backends.tensorrt import Gpu, import_tensorrt, machine_of
from damoyolo.backends.tensorrt_metadata import BatchRange, EngineMetadata, require_contiguous

PRECISIONS = ("fp32", "fp16", "int8")
# Of pixels TensorRT converts uint8 to these two, and does nothing else with it.
PIXEL_CASTS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
EXPORT_COMMAND = "python scripts/export_onnx.py"


class EngineBuildError(Exception):
    """No engine could be built."""


@dataclass(frozen=True)
class OnnxNetwork:
    """An ONNX file and what it says of itself; sha256 is of the file, in hexadecimal."""

    path: Path
    sha256: str
    facts: OnnxMetadata


@dataclass(frozen=True)
class EngineRequest:
    """What to build.

    batch_ranges: one an optimisation profile, tuned for the largest batch of each.
    input_size_hw: what the engine is tuned for, in pixels. min_size_hw, max_size_hw: what else it takes.
    timing_cache: file of measured kernel times, read if it is there and written; None keeps none.
    workspace_mib: most scratch memory of a layer; None leaves it to TensorRT.
    """

    network: OnnxNetwork
    batch_ranges: tuple[BatchRange, ...]
    input_size_hw: tuple[int, int]
    min_size_hw: tuple[int, int]
    max_size_hw: tuple[int, int]
    timing_cache: Path | None = None
    workspace_mib: int | None = None

    def __post_init__(self) -> None:
        require_contiguous(self.batch_ranges)
        sizes = zip(self.min_size_hw, self.input_size_hw, self.max_size_hw, strict=True)
        if any(
            low > best or best > high or {low % 32, best % 32, high % 32} != {0} for low, best, high in sizes
        ):
            raise EngineBuildError(
                f"input sizes from {list(self.min_size_hw)} over {list(self.input_size_hw)} to "
                f"{list(self.max_size_hw)}; accepted are ascending multiples of 32"
            )


def read_onnx(path: Path) -> OnnxNetwork:
    """What an ONNX file says of itself, if TensorRT can take it.

    Raises:
        EngineBuildError: with what TensorRT would refuse, or misunderstand.
    """
    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
        facts = OnnxMetadata.from_metadata({each.key: each.value for each in model.metadata_props}, path)
    except Exception as error:  # protobuf, which reads it, has errors of its own
        raise EngineBuildError(
            f"{path} is no ONNX file of this project ({type(error).__name__}: {error}); {EXPORT_COMMAND} "
            "writes one"
        ) from error
    if facts.precision not in PRECISIONS:
        raise EngineBuildError(
            f"{path} is of precision {facts.precision!r}; accepted are {', '.join(PRECISIONS)}: export it "
            "anew"
        )
    _require_interface(path, model.graph)
    if facts.precision == "int8":
        _require_symmetric(path, model.graph)
    return OnnxNetwork(path, hashlib.sha256(content).hexdigest(), facts)


def build_engine(request: EngineRequest, gpu: Gpu) -> tuple[bytes, EngineMetadata]:
    """The engine and its description. Takes minutes; the GPU has to be idle, or the times are wrong.

    Raises:
        ConfigError: TensorRT is missing.
        EngineBuildError: it cannot build this.
    """
    trt = import_tensorrt()
    network = request.network
    logger = trt.Logger(trt.Logger.WARNING)
    with gpu.selected():
        builder = trt.Builder(logger)
        # 11 types strongly without being told, 10 does not.
        definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(definition, logger)
        if not parser.parse_from_file(str(network.path)):
            errors = [_text_of(parser.get_error(index)) for index in range(parser.num_errors)]
            raise EngineBuildError(
                f"TensorRT {trt.__version__} cannot read {network.path}: {'; '.join(errors)}"
            )
        config = builder.create_builder_config()
        if request.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mib << 20)
        if network.facts.precision == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)  # allowed unless cleared, and no float32
        for batch_range in request.batch_ranges:
            _add_profile(builder, config, request, batch_range)
        cache = _open_timing_cache(trt, config, request.timing_cache)
        built = builder.build_serialized_network(definition, config)
        if built is None:
            raise EngineBuildError(
                f"TensorRT {trt.__version__} built no engine from {network.path}; it says why in its own "
                "lines above. More scratch memory (--workspace-mib) or a smaller largest batch may help"
            )
        if cache is not None and request.timing_cache is not None:
            _replace(request.timing_cache, bytes(cache.serialize()))
    plan = bytes(built)
    metadata = EngineMetadata(
        machine=machine_of(gpu, trt),
        network=network.facts,
        min_size_hw=request.min_size_hw,
        max_size_hw=request.max_size_hw,
        batch_ranges=request.batch_ranges,
        onnx_sha256=network.sha256,
        plan_sha256=hashlib.sha256(plan).hexdigest(),
    )
    return plan, metadata


def _require_interface(path: Path, graph: Any) -> None:
    inputs = {each.name: each.type.tensor_type.elem_type for each in graph.input}
    outputs = {each.name for each in graph.output}
    if inputs != {INPUT_NAME: onnx.TensorProto.UINT8} or outputs != set(OUTPUT_NAMES):
        raise EngineBuildError(
            f"{path} has the inputs {', '.join(inputs)} and the outputs {', '.join(sorted(outputs))}; "
            f"accepted is {INPUT_NAME} of uint8 in and the raw predictions out, without NMS: "
            f"{EXPORT_COMMAND} --form raw"
        )
    readers = [node for node in graph.node if INPUT_NAME in node.input]
    foreign = [node for node in readers if node.op_type != "Cast" or _cast_to(node) not in PIXEL_CASTS]
    if foreign:
        raise EngineBuildError(
            f"{path}: {', '.join(sorted({node.op_type for node in foreign}))} reads the uint8 pixels; "
            "TensorRT takes a Cast to float32 or float16 there only: export the file anew"
        )


def _cast_to(node: Any) -> int:
    to: int = next(each.i for each in node.attribute if each.name == "to")
    return to


def _require_symmetric(path: Path, graph: Any) -> None:
    """Refuse what TensorRT does not take as explicit quantisation: other than int8 around zero."""
    constants = {each.name: each for each in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if not nodes:
        raise EngineBuildError(f"{path} says int8 and has no QuantizeLinear node; quantise it anew")
    for node in nodes:
        zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero_point is None or zero_point.data_type != onnx.TensorProto.INT8:
            found = "none" if zero_point is None else onnx.TensorProto.DataType.Name(zero_point.data_type)
            raise EngineBuildError(
                f"{path}: the zero point of {node.name} is of type {found}; TensorRT takes INT8 only, for "
                "activations and weights, and biases in float: quantise it anew so"
            )
        if np.any(onnx.numpy_helper.to_array(zero_point)):
            raise EngineBuildError(
                f"{path}: the zero point of {node.name} is not 0; TensorRT takes symmetric quantisation "
                "only: quantise it anew so"
            )


def _text_of(error: Any) -> str:
    return f"{error.desc()} (node {error.node_name() or error.node()}, {error.node_operator()})"


def _add_profile(builder: Any, config: Any, request: EngineRequest, batch_range: BatchRange) -> None:
    profile = builder.create_optimization_profile()
    profile.set_shape(
        INPUT_NAME,
        (batch_range.smallest, 3, *request.min_size_hw),
        (batch_range.largest, 3, *request.input_size_hw),
        (batch_range.largest, 3, *request.max_size_hw),
    )
    if config.add_optimization_profile(profile) < 0:
        raise EngineBuildError(
            f"TensorRT refused the profile of batch sizes {batch_range.smallest} to {batch_range.largest}; "
            "it says why in its own lines above"
        )


def _open_timing_cache(trt: ModuleType, config: Any, path: Path | None) -> Any:
    """The cache to measure into; it has to live until the engine is built. None if none is kept."""
    if path is None:
        return None
    if path.is_file():
        cache = config.create_timing_cache(path.read_bytes())
        # Times of another GPU would choose other kernels without a word.
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
        print(f"{path} is of another GPU or of another TensorRT than {trt.__version__}: starting it anew")
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(content)
    partial.replace(path)
