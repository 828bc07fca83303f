"""The TensorRT backend on a stand-in for TensorRT: what it calls, in which order, and what it refuses."""

import dataclasses
import json
import operator
import sys

import pytest
import torch

from lib.tensorrt.builder import build_engine, read_network

from damoyolo.backends.onnx_metadata import metadata_of
from damoyolo.backends.tensorrt import (
    ENGINE_FILE,
    METADATA_FILE,
    Gpu,
    Machine,
    TensorRTBackend,
    import_tensorrt,
    read_metadata,
)
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS
from doubles import fake_tensorrt as fake_tensorrt

CPU = torch.device("cpu")
NAMES = ("Zelle", "Plättchen")
HERE = Machine("11.4.0.106", "Stand-in GPU", "9.0")
SIZE_HW = (64, 96)
CONFIG = ServingConfig(variant="Ns", class_names=NAMES, input_size_hw=SIZE_HW, backend="tensorrt")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return build_model(VARIANTS["Ns"], len(NAMES), folded=True).requires_grad_(False)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, model):
    fake_tensorrt.install(monkeypatch, lambda pixels: model(pixels.float()))


@pytest.fixture
def built(tmp_path, model):
    """An engine and its metadata."""
    path = fake_tensorrt.write_onnx(tmp_path / "network.onnx", metadata_of(model, NAMES))
    engine = build_engine(read_network(path), fake_tensorrt.Gpu(CPU), SIZE_HW, (1, 4))
    fake_tensorrt.calls.clear()
    return engine


@pytest.fixture
def backend(built):
    backend = TensorRTBackend(*built, CPU)
    fake_tensorrt.calls.clear()
    return backend


def pixels(count, height=64, width=96):
    """As the preprocessing gives them: (B, 3, H, W) uint8, channels last in memory."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    return values.permute(0, 3, 1, 2)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 11])
def test_every_batch_size_gives_what_the_network_gives_and_later_calls_leave_it_alone(backend, model, count):
    batch = pixels(count)
    found, expected = backend(batch), model(batch.float())
    backend(batch.flip(0) // 2)
    for level, wanted in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-4, atol=1e-4)


def test_another_size_is_refused(backend):
    with pytest.raises(RuntimeError, match=r"take an input of \(2, 3, 96, 96\)"):
        backend(pixels(2, 96, 96))


def test_the_profile_is_switched_before_the_shape_is_set_and_only_when_it_changes(backend):
    run = ["set_input_shape", *["set_tensor_address"] * 7, "execute_async_v3"]
    for count, switches in ((1, False), (2, True), (4, False), (1, True)):
        fake_tensorrt.calls.clear()
        backend(pixels(count))
        switch = ["set_optimization_profile_async"] * switches
        assert fake_tensorrt.calls == ["stream begins", *switch, *run, "stream ends"]


@pytest.mark.parametrize(
    "call", ["set_optimization_profile_async", "set_input_shape", "set_tensor_address", "execute_async_v3"]
)
def test_a_call_that_fails_at_run_time_is_no_answer(backend, call):
    fake_tensorrt.failing.add(call)
    with pytest.raises(RuntimeError, match="TensorRT could not"):
        backend(pixels(2))


@pytest.mark.parametrize("call", ["deserialize_cuda_engine", "create_execution_context"])
def test_an_engine_that_does_not_load_is_refused(built, call):
    fake_tensorrt.failing.add(call)
    with pytest.raises(ConfigError, match="TensorRT could not"):
        TensorRTBackend(*built, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensorrt_version": "10.16.1.11"}, r"tensorrt version 10\.16\.1\.11, here it is 11\.4\.0\.106"),
        ({"gpu_name": "NVIDIA B"}, "gpu name NVIDIA B, here it is Stand-in GPU"),
        ({"compute_capability": "8.9"}, r"compute capability 8\.9, here it is 9\.0"),
        ({}, "damaged or was replaced"),
    ],
)
def test_a_foreign_machine_or_a_damaged_plan_is_refused_before_anything_is_loaded(built, change, message):
    plan, metadata = built
    assert metadata.machine == HERE
    other = dataclasses.replace(metadata, machine=HERE._replace(**change))
    with pytest.raises(ConfigError, match=rf"{message}.*build_tensorrt\.py --onnx"):
        TensorRTBackend(plan if change else plan + b" ", other, CPU)
    assert fake_tensorrt.calls == []


def test_the_engine_of_an_archive_is_found_and_a_missing_one_named(built, model, tmp_path):
    with pytest.raises(ConfigError, match=f"no {ENGINE_FILE}"):
        TensorRTBackend.from_archive_dir(tmp_path, model, CONFIG, CPU)
    (tmp_path / ENGINE_FILE).write_bytes(built[0])
    (tmp_path / METADATA_FILE).write_text(built[1].to_json(), encoding="utf-8")
    backend = TensorRTBackend.from_archive_dir(tmp_path, model, CONFIG, CPU)
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
def test_metadata_of_another_form_are_refused(built, tmp_path, change):
    path = tmp_path / METADATA_FILE
    path.write_text("[]" if change is None else json.dumps({**json.loads(built[1].to_json()), **change}))
    with pytest.raises(ConfigError, match=r"build_tensorrt|export_onnx"):
        read_metadata(path)
    with pytest.raises(ConfigError, match=r"none\.json does not describe .*build_tensorrt"):
        read_metadata(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("settings", "size_hw", "message"),
    [
        ({}, (32, 96), r"is \[32, 96\] \(height, width\), the TensorRT engine takes \[64, 96\]"),
        ({"class_names": ("a", "b")}, SIZE_HW, "is of class_names Zelle, Plättchen, settings and .* a, b;"),
        ({"precision": "bf16"}, SIZE_HW, "engine is fp32; set precision to auto"),
    ],
)
def test_settings_of_another_network_are_refused(model, built, settings, size_hw, message):
    for precision in ("auto", "fp32"):
        built[1].require_network(model, dataclasses.replace(CONFIG, precision=precision), SIZE_HW)
    with pytest.raises(ConfigError, match=message):
        built[1].require_network(model, dataclasses.replace(CONFIG, **settings), size_hw)


def test_without_the_module_or_a_gpu_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match="pip install tensorrt-cu13"):
        import_tensorrt()
    with pytest.raises(ConfigError, match=r"device is cpu; TensorRT runs on cuda"):
        Gpu(CPU)


def test_the_stand_in_has_nothing_that_the_real_module_lacks(monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorrt")
    tensorrt = pytest.importorskip("tensorrt")
    for name in ("__version__", *fake_tensorrt.public_names()):
        operator.attrgetter(name)(tensorrt)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_stream_of_a_gpu_starts_after_the_current_one_and_is_waited_for():
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
