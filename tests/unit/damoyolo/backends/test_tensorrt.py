"""The TensorRT backend on a stand-in for TensorRT: what it calls, in which order, and what it refuses."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.tensorrt.builder import EngineRequest, build_engine, read_onnx

from damoyolo.backends.onnx_metadata import metadata_of
from damoyolo.backends.tensorrt import Gpu, TensorRTBackend, import_tensorrt
from damoyolo.backends.tensorrt_metadata import ENGINE_FILE, METADATA_FILE, BatchRange, EngineMetadata
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import DamoYolo, build_model
from damoyolo.model.variants import VARIANTS
from doubles import fake_tensorrt as fake_tensorrt
from doubles.tensorrt_material import install_stand_in, write_onnx

CPU = torch.device("cpu")
NAMES = ("one", "two")
Built = tuple[bytes, EngineMetadata]


@pytest.fixture(scope="module")
def model() -> DamoYolo:
    torch.manual_seed(3)
    return build_model(VARIANTS["Ns"], len(NAMES), folded=True).requires_grad_(False)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, model: DamoYolo) -> None:
    install_stand_in(monkeypatch)

    def network(pixels: Tensor) -> list[Tensor]:
        raw = model(pixels.float())
        return [*raw.class_logits, *raw.distance_logits]

    fake_tensorrt.network = network


@pytest.fixture
def built(tmp_path: Path, model: DamoYolo) -> Built:
    path = write_onnx(tmp_path / "network.onnx", metadata_of(model, NAMES))
    request = EngineRequest(
        read_onnx(path),
        batch_ranges=(BatchRange(1, 1), BatchRange(2, 4)),
        input_size_hw=(64, 96),
        min_size_hw=(64, 96),
        max_size_hw=(96, 128),
    )
    return build_engine(request, fake_tensorrt.Gpu(CPU))


@pytest.fixture
def backend(built: Built) -> TensorRTBackend:
    backend = TensorRTBackend(*built, CPU)
    fake_tensorrt.calls.clear()
    return backend


def pixels(count: int, height: int = 64, width: int = 96) -> Tensor:
    """As the preprocessing gives them: (B, 3, H, W) uint8 with the channels innermost in memory."""
    generator = torch.Generator().manual_seed(5)
    grey = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    return grey.permute(0, 3, 1, 2)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 11])
def test_every_batch_size_gives_what_the_network_gives(
    backend: TensorRTBackend, model: DamoYolo, count: int
) -> None:
    batch = pixels(count)
    found, expected = backend(batch), model(batch.float())
    for level, wanted in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-4, atol=1e-4)


def test_other_sizes_of_its_range_are_taken_and_others_refused(
    backend: TensorRTBackend, model: DamoYolo
) -> None:
    batch = pixels(2, 96, 128)
    torch.testing.assert_close(backend(batch)[0][2], model(batch.float())[0][2], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="heights 64 to 96 and widths 96 to 128"):
        backend(pixels(1, 128, 128))


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


def test_a_foreign_machine_is_refused_before_anything_is_loaded(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.calls.clear()
    monkeypatch.setattr(fake_tensorrt, "__version__", "10.16.1.11")
    with pytest.raises(ConfigError, match=r"here it is 10\.16\.1\.11"):
        TensorRTBackend(*built, CPU)
    with pytest.raises(ConfigError, match="damaged"):
        TensorRTBackend(built[0] + b" ", built[1], CPU)
    assert fake_tensorrt.calls == []


def test_an_engine_of_another_form_is_refused_with_what_it_has(built: Built) -> None:
    plan, metadata = built
    more_classes = dataclasses.replace(metadata.network, num_classes=3)
    fewer_profiles = (BatchRange(1, 4),)
    for change in ({"network": more_classes}, {"batch_ranges": fewer_profiles}):
        with pytest.raises(ConfigError, match=r"class_logits_8 FLOAT \[-1, 2, .*2 profiles; accepted is"):
            TensorRTBackend(plan, dataclasses.replace(metadata, **change), CPU)


def test_the_engine_of_an_archive_is_found_and_a_missing_one_named(
    built: Built, model: DamoYolo, tmp_path: Path
) -> None:
    config = ServingConfig(variant="Ns", class_names=NAMES, input_size_hw=(64, 96), backend="tensorrt")
    with pytest.raises(ConfigError, match=f"no {ENGINE_FILE}"):
        TensorRTBackend.from_archive_dir(tmp_path, model, config, CPU)
    (tmp_path / ENGINE_FILE).write_bytes(built[0])
    (tmp_path / METADATA_FILE).write_text(built[1].to_json())
    backend = TensorRTBackend.from_archive_dir(tmp_path, model, config, CPU)
    assert (backend.name, backend.precision, backend.device) == ("tensorrt", "fp32", CPU)


def test_without_the_module_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match="pip install tensorrt-cu13"):
        import_tensorrt()


def test_without_a_gpu_the_message_says_so() -> None:
    with pytest.raises(ConfigError, match=r"device is cpu; TensorRT runs on cuda"):
        Gpu(CPU)


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
