"""The TensorRT backend on a stand-in for TensorRT: what it calls, in which order, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.tensorrt.builder import build_engine, read_network

from damoyolo.backends.onnx_metadata import metadata_of
from damoyolo.backends.tensorrt import (
    ENGINE_FILE,
    METADATA_FILE,
    EngineMetadata,
    Gpu,
    Machine,
    TensorRTBackend,
    import_tensorrt,
    read_metadata,
)
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo, build_model
from damoyolo.model.variants import VARIANTS
from doubles import fake_tensorrt as fake_tensorrt

CPU = torch.device("cpu")
NAMES = ("Zelle", "Plättchen")
HERE = Machine("11.4.0.106", "Stand-in GPU", "9.0")
Built = tuple[bytes, EngineMetadata]


@pytest.fixture(scope="module")
def model() -> DamoYolo:
    torch.manual_seed(3)
    return build_model(VARIANTS["Ns"], len(NAMES), folded=True).requires_grad_(False)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, model: DamoYolo) -> None:
    fake_tensorrt.install(monkeypatch, lambda pixels: model(pixels.float()))


@pytest.fixture
def built(tmp_path: Path, model: DamoYolo) -> Built:
    path = fake_tensorrt.write_onnx(tmp_path / "network.onnx", metadata_of(model, NAMES))
    return build_engine(read_network(path), fake_tensorrt.Gpu(CPU), (64, 96), (1, 4))


@pytest.fixture
def metadata(built: Built) -> EngineMetadata:
    return built[1]


@pytest.fixture
def backend(built: Built) -> TensorRTBackend:
    backend = TensorRTBackend(*built, CPU)
    fake_tensorrt.calls.clear()
    return backend


def pixels(count: int, height: int = 64, width: int = 96) -> Tensor:
    """As the preprocessing gives them: (B, 3, H, W) uint8, channels last in memory."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    return values.permute(0, 3, 1, 2)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 11])
def test_every_batch_size_gives_what_the_network_gives(
    backend: TensorRTBackend, model: DamoYolo, count: int
) -> None:
    batch = pixels(count)
    found, expected = backend(batch), model(batch.float())
    for level, wanted in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-4, atol=1e-4)


def test_another_size_is_refused(backend: TensorRTBackend) -> None:
    with pytest.raises(RuntimeError, match=r"take an input of \(2, 3, 96, 96\)"):
        backend(pixels(2, 96, 96))


def test_later_calls_leave_earlier_predictions_alone(backend: TensorRTBackend) -> None:
    first = backend(pixels(2))
    before = first.class_logits[0].clone()
    backend(pixels(2).flip(0) // 2)
    torch.testing.assert_close(first.class_logits[0], before, rtol=0, atol=0)


def test_the_profile_is_switched_before_the_shape_is_set_and_only_when_it_changes(
    backend: TensorRTBackend,
) -> None:
    run = ["set_input_shape", *["set_tensor_address"] * 7, "execute_async_v3"]
    for count, switches in ((1, False), (2, True), (4, False), (1, True)):
        fake_tensorrt.calls.clear()
        backend(pixels(count))
        switch = ["set_optimization_profile_async"] * switches
        assert fake_tensorrt.calls == ["stream begins", *switch, *run, "stream ends"]


@pytest.mark.parametrize(
    "call",
    ["set_optimization_profile_async", "set_input_shape", "set_tensor_address", "execute_async_v3"],
)
def test_a_call_that_fails_at_run_time_is_no_answer(backend: TensorRTBackend, call: str) -> None:
    fake_tensorrt.failing.add(call)
    with pytest.raises(RuntimeError, match="TensorRT could not"):
        backend(pixels(2))


@pytest.mark.parametrize("call", ["deserialize_cuda_engine", "create_execution_context"])
def test_an_engine_that_does_not_load_is_refused(built: Built, call: str) -> None:
    fake_tensorrt.failing.add(call)
    with pytest.raises(ConfigError, match=r"TensorRT could not .*build_tensorrt\.py"):
        TensorRTBackend(*built, CPU)


def test_a_foreign_machine_or_a_damaged_plan_is_refused_before_anything_is_loaded(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.calls.clear()
    with pytest.raises(ConfigError, match="damaged or was replaced"):
        TensorRTBackend(built[0] + b" ", built[1], CPU)
    monkeypatch.setattr(fake_tensorrt, "__version__", "10.16.1.11")
    with pytest.raises(ConfigError, match=r"here it is 10\.16\.1\.11"):
        TensorRTBackend(*built, CPU)
    assert fake_tensorrt.calls == []


@pytest.mark.parametrize("change", ["num_classes", "batch_sizes"])
def test_an_engine_of_another_form_is_refused_with_what_it_has(built: Built, change: str) -> None:
    plan, metadata = built
    if change == "num_classes":
        network = dataclasses.replace(metadata.network, num_classes=3)
        metadata = dataclasses.replace(metadata, network=network)
    else:
        metadata = dataclasses.replace(metadata, batch_sizes=(4,))
    with pytest.raises(ConfigError, match=r"'class_logits_8': \(.*FLOAT.*, 2\).* 2 profiles; accepted are"):
        TensorRTBackend(plan, metadata, CPU)


def test_the_engine_of_an_archive_is_found_and_a_missing_one_named(
    built: Built, model: DamoYolo, tmp_path: Path
) -> None:
    config = ServingConfig(variant="Ns", class_names=NAMES, input_size_hw=(64, 96), backend="tensorrt")
    with pytest.raises(ConfigError, match=f"no {ENGINE_FILE}"):
        TensorRTBackend.from_archive_dir(tmp_path, model, config, CPU)
    (tmp_path / ENGINE_FILE).write_bytes(built[0])
    (tmp_path / METADATA_FILE).write_text(built[1].to_json(), encoding="utf-8")
    backend = TensorRTBackend.from_archive_dir(tmp_path, model, config, CPU)
    assert backend.metadata == built[1]  # read back as written
    assert (backend.name, backend.precision, backend.device) == ("tensorrt", "fp32", CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "damoyolo-tensorrt-1"},
        {"machine": {"gpu_name": "x"}},
        {"network": {}},
        {"input_size_hw": [320]},
        {"batch_sizes": 3},
        {"unknown": 1},
        None,
    ],
)
def test_metadata_of_another_form_are_refused(
    metadata: EngineMetadata, tmp_path: Path, change: dict[str, object] | None
) -> None:
    path = tmp_path / METADATA_FILE
    path.write_text("[]" if change is None else json.dumps({**json.loads(metadata.to_json()), **change}))
    with pytest.raises(ConfigError, match=r"build_tensorrt|export_onnx"):
        read_metadata(path)
    with pytest.raises(ConfigError, match=r"none\.json does not describe .*build_tensorrt"):
        read_metadata(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (
            HERE._replace(tensorrt_version="10.16.1.11"),
            r"tensorrt version 11\.4\.0\.106, here it is 10\.16\.1\.11",
        ),
        (HERE._replace(gpu_name="NVIDIA B"), "gpu name Stand-in GPU, here it is NVIDIA B"),
        (HERE._replace(compute_capability="8.9"), r"compute capability 9\.0, here it is 8\.9"),
    ],
)
def test_another_machine_is_refused_with_both_and_the_command(
    metadata: EngineMetadata, here: Machine, message: str
) -> None:
    metadata.require_machine(HERE)
    command = rf"build_tensorrt\.py --onnx.*{metadata.onnx_sha256}"
    with pytest.raises(ConfigError, match=rf"{message}.*{command}"):
        metadata.require_machine(here)


@pytest.mark.parametrize(
    ("settings", "size_hw", "message"),
    [
        ({}, (32, 96), r"is \[32, 96\] \(height, width\), the TensorRT engine takes \[64, 96\]"),
        ({"class_names": ("a", "b")}, (64, 96), "class_names"),
        ({"precision": "bf16"}, (64, 96), "engine is fp32; set precision to auto"),
    ],
)
def test_settings_of_another_network_are_refused(
    model: DamoYolo,
    metadata: EngineMetadata,
    settings: dict[str, object],
    size_hw: tuple[int, int],
    message: str,
) -> None:
    good = {"variant": "Ns", "class_names": NAMES}
    for precision in ("auto", "fp32"):
        metadata.require_network(model, ServingConfig(**good, precision=precision), (64, 96))
    with pytest.raises(ConfigError, match=message):
        metadata.require_network(model, ServingConfig(**{**good, **settings}), size_hw)


def test_an_engine_of_other_weights_is_refused(model: DamoYolo, metadata: EngineMetadata) -> None:
    network = dataclasses.replace(metadata.network, weights_digest="0" * 64)
    foreign = dataclasses.replace(metadata, network=network)
    with pytest.raises(ConfigError, match="weights_digest 0000"):
        foreign.require_network(model, ServingConfig(variant="Ns", class_names=NAMES), (64, 96))


def test_without_the_module_or_a_gpu_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match="pip install tensorrt-cu13"):
        import_tensorrt()
    with pytest.raises(ConfigError, match=r"device is cpu; TensorRT runs on cuda"):
        Gpu(CPU)


def test_the_stand_in_has_nothing_that_the_real_module_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")
    tensorrt = pytest.importorskip("tensorrt")
    missing = [
        (name, attribute)
        for name, attribute in fake_tensorrt.public_names()
        if not hasattr(tensorrt, name)
        or (attribute is not None and not hasattr(getattr(tensorrt, name), attribute))
    ]
    assert missing == []
    assert hasattr(tensorrt, "__version__")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_stream_of_a_gpu_starts_after_the_current_one_and_is_waited_for() -> None:
    device = torch.device("cuda")
    gpu = Gpu(device)
    assert gpu.name
    assert gpu.compute_capability.count(".") == 1
    source = torch.randn(4096, 4096, device=device)
    target = torch.zeros_like(source)
    expected = (source @ source).sum()
    product = source @ source  # long enough to be under way still
    with gpu.selected(), gpu.stream() as handle:
        assert handle != 0
        with torch.cuda.stream(torch.cuda.ExternalStream(handle, device)):
            target.copy_(product)
    torch.testing.assert_close(target.sum(), expected)
