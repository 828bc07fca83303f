"""Every backend: the values of plain PyTorch in every size, batch equals single, helpful refusals."""

import copy
import logging
import subprocess
import sys

import onnx
import pytest
import torch

from damoyolo import backends
from damoyolo.backends import ONNX_FILE
from damoyolo.backends import precision as precisions
from damoyolo.backends.openvino_import import openvino_core
from damoyolo.backends.precision import PRECISIONS_OF_DEVICE
from damoyolo.boxes import decode_predictions
from damoyolo.config import ServingConfig
from damoyolo.errors import ConfigError

# Backend, precision, and whether the archive has the ONNX file.
FLOAT32 = [
    ("pytorch", "fp32", False),
    ("onnxruntime", "fp32", True),
    ("openvino", "fp32", False),
    ("openvino", "fp32", True),
]
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REDUCED = [  # also the device
    ("pytorch", "amp", False, "cpu"),
    ("pytorch", "bf16", False, "cpu"),
    ("openvino", "bf16", False, "cpu"),
    ("openvino", "bf16", True, "cpu"),
    *(pytest.param("pytorch", each, False, "cuda", marks=ON_A_GPU) for each in PRECISIONS_OF_DEVICE["cuda"]),
]
# Largest difference of a score from float32, for logits of an untrained network.
SCORE_TOLERANCE = {"fp32": 1e-5, "tf32": 2e-3, "amp": 2e-2, "fp16": 2e-3, "bf16": 2e-2}
SIZES = [(1, 64, 96), (3, 128, 64), (8, 32, 32), (2, 192, 160)]


def pixels_of(batch_size, height, width):
    """(B, 3, H, W) uint8."""
    generator = torch.Generator().manual_seed(batch_size)
    return torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8, generator=generator)


def assert_near(backend, network, pixels, tolerance):
    """Scores within the tolerance of plain float32, boxes within fifty times as many pixels."""
    expected = decode_predictions(network(pixels.float()))
    scores, boxes_xyxy = decode_predictions(backend(pixels.to(backend.device)))
    torch.testing.assert_close(scores.cpu(), expected[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(boxes_xyxy.cpu(), expected[1], rtol=0, atol=50 * tolerance)


@pytest.fixture(scope="module", params=FLOAT32, ids=str)
def float32_backend(request, open_network, onnx_dir):
    name, precision, has_file = request.param
    backend = open_network(onnx_dir if has_file else None, backend=name, precision=precision)
    assert (backend.name, backend.precision, backend.device.type) == (name, precision, "cpu")
    return backend


def test_float32_gives_the_values_of_plain_pytorch_in_every_size(float32_backend, network):
    for size in SIZES:
        assert_near(float32_backend, network, pixels_of(*size), 1e-5)


def test_a_batch_gives_what_each_image_gives_alone_and_later_calls_leave_it_alone(float32_backend):
    pixels = pixels_of(3, 96, 64)
    together = float32_backend(pixels)
    kept = [level.clone() for level in together.class_logits]
    for index in range(3):
        alone = float32_backend(pixels[index : index + 1])
        for level, one in zip(together.distance_logits, alone.distance_logits, strict=True):
            torch.testing.assert_close(level[index : index + 1], one, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, together.class_logits, kept))


def test_openvino_takes_a_batch_in_one_call_or_image_by_image_with_equal_results(open_network, monkeypatch):
    def open_with(few_threads):
        monkeypatch.setattr("damoyolo.backends.openvino.FEW_THREADS", few_threads)
        return open_network(backend="openvino", precision="fp32", input_size_hw=[64, 96])

    one_by_one, at_once = open_with(torch.get_num_threads()), open_with(torch.get_num_threads() - 1)
    channels_last = pixels_of(3, 64, 96).contiguous(memory_format=torch.channels_last)
    for pixels in (channels_last, channels_last[:1], pixels_of(2, 32, 64)):
        for found, expected in zip(one_by_one(pixels), at_once(pixels), strict=True):
            for level, other in zip(found, expected, strict=True):
                # Float32 sums of up to some thousand products in another order.
                torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-4)
    assert one_by_one.batch_request is None
    assert at_once.batch_request is not None


def test_openvino_compiles_for_batches_only_when_one_comes(open_network, monkeypatch):
    monkeypatch.setattr("damoyolo.backends.openvino.FEW_THREADS", 0)
    backend = open_network(backend="openvino", precision="fp32", input_size_hw=[64, 96])
    backend(pixels_of(1, 64, 96))
    assert backend.batch_request is None
    backend(pixels_of(2, 64, 96))
    assert backend.batch_request is not None


def openvino_multiplies_bf16():
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize(("name", "precision", "has_file", "device"), REDUCED)
def test_other_precisions_stay_near_float32_and_16_bits_are_not_float32_in_disguise(
    open_network, network, onnx_dir, name, precision, has_file, device
):
    folder = onnx_dir if has_file else None
    backend = open_network(folder, device, backend=name, precision=precision)
    assert backend.precision == precision
    pixels = pixels_of(2, 96, 128)
    assert_near(backend, network, pixels, SCORE_TOLERANCE[precision])
    if precision not in ("fp32", "tf32") and (name == "pytorch" or openvino_multiplies_bf16()):
        with pytest.raises(AssertionError):
            assert_near(backend, network, pixels, 1e-5)


# One variant of each kind of backbone; the slow cases add breadth, not another path through the backends.
@pytest.mark.parametrize(
    ("variant", "name", "has_file"),
    [
        ("S", "openvino", False),
        ("S", "onnxruntime", True),
        ("Ns", "openvino", False),
        pytest.param("S", "openvino", True, marks=pytest.mark.slow),
        pytest.param("T", "openvino", False, marks=pytest.mark.slow),
        pytest.param("M", "openvino", False, marks=pytest.mark.slow),
        pytest.param("M", "onnxruntime", True, marks=pytest.mark.slow),
        pytest.param("Ns", "onnxruntime", True, marks=pytest.mark.slow),
    ],
)
def test_the_golden_outputs_come_from_every_backend(
    variant, name, has_file, golden, golden_model, golden_images, golden_onnx_dir, model_dir
):
    names = tuple(map(str, range(80)))
    config = ServingConfig(variant=variant, class_names=names, backend=name, precision="fp32")
    folder = golden_onnx_dir(variant) if has_file else None
    model = copy.deepcopy(golden_model(variant, True))  # others share it, and a backend may change it
    backend = backends.open_backend(model, config, torch.device("cpu"), folder)
    scores, boxes_xyxy = decode_predictions(backend(golden_images(variant).to(torch.uint8)))
    assert golden.check((scores, boxes_xyxy), model_dir / f"golden_{variant}.npz")


@pytest.mark.parametrize(("in_hardware", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_openvino_and_bfloat16_only_where_the_cpu_computes_it(
    open_network, onnx_dir, monkeypatch, in_hardware, expected
):
    monkeypatch.setattr(precisions, "cpu_computes_bf16", lambda: in_hardware)
    backend = open_network(onnx_dir)
    assert (backend.name, backend.precision) == ("openvino", expected)


def test_auto_without_openvino_is_pytorch_and_says_so(open_network, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert open_network(precision="fp32").name == "pytorch"
    assert "openvino is not installed" in caplog.text


def test_auto_takes_pytorch_for_what_only_pytorch_computes_and_on_a_gpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert backends.choose_backend(ServingConfig(precision="amp"), cpu) == "pytorch"
    assert backends.choose_backend(ServingConfig(), cuda) == "pytorch"


@pytest.mark.parametrize("library", ["openvino", "onnxruntime"])
def test_a_missing_library_is_refused_with_what_to_install(open_network, onnx_dir, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    message = rf"backend is '{library}'.*pip install {library}, or set backend to"
    with pytest.raises(ConfigError, match=message):
        open_network(onnx_dir, backend=library)


@pytest.mark.parametrize(
    ("backend", "accepted"), [("openvino", "auto, fp32, bf16"), ("onnxruntime", "auto, fp32")]
)
def test_a_precision_that_a_backend_lacks_is_refused(open_network, onnx_dir, backend, accepted):
    with pytest.raises(ConfigError, match=rf"'fp16'; accepted with backend {backend} are {accepted}"):
        open_network(onnx_dir, backend=backend, precision="fp16")


def test_a_backend_that_cannot_run_is_refused(open_network, onnx_dir):
    with pytest.raises(ConfigError, match=r"holds no damoyolo\.onnx; build it with --backend onnxruntime"):
        open_network(backend="onnxruntime")
    with pytest.raises(ConfigError, match="runs on a CPU, not on cuda"):
        open_network(backend="openvino", device="cuda")
    with pytest.raises(ConfigError, match="backend is 'caffe'; accepted are auto, pytorch"):
        open_network(backend="caffe")


def rewrite(onnx_dir, folder, change):
    """Copy the ONNX file with other metadata, or with none."""
    written = onnx.load(onnx_dir / ONNX_FILE)
    metadata = {entry.key: entry.value for entry in written.metadata_props}
    onnx.helper.set_model_props(written, {} if change is None else {**metadata, **change})
    onnx.save(written, folder / ONNX_FILE)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        ({"variant": "S"}, "is of variant S, settings and weights of the archive are of T"),
        ({"class_names": '["a", "b", "c"]'}, "is of class_names a, b, c,"),
        ({"weights_digest": "0"}, "is of weights_digest 0,"),
        ({"form": "boxes"}, "is of form boxes"),
        ({"precision": "int4"}, "precision 'int4'; accepted are fp32 and int8"),
        ({"num_classes": "many"}, "does not say what it holds"),
        (None, "does not say what it holds"),
    ],
)
def test_a_file_of_another_network_is_refused(open_network, onnx_dir, tmp_path, backend, change, mentions):
    rewrite(onnx_dir, tmp_path, change)
    with pytest.raises(ConfigError, match=mentions):
        open_network(tmp_path, backend=backend, precision="fp32")


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_damaged_file_is_refused(open_network, onnx_dir, tmp_path, backend):
    (tmp_path / ONNX_FILE).write_bytes((onnx_dir / ONNX_FILE).read_bytes()[:5000])
    with pytest.raises(ConfigError, match=rf"damoyolo\.onnx cannot be (opened|read) by {backend}"):
        open_network(tmp_path, backend=backend)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_quantised_file_says_so_of_the_backend(open_network, onnx_dir, tmp_path, backend):
    rewrite(onnx_dir, tmp_path, {"precision": "int8"})
    assert open_network(tmp_path, backend=backend).precision == "int8"


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(
    ("flags", "precision", "warnings"),
    [("avx2 avx512f", "int8", 1), ("avx2 avx_vnni", "int8", 0), ("avx2 avx512f", "fp32", 0)],
)
def test_a_processor_without_vnni_gets_one_warning_about_int8(
    open_network, onnx_dir, tmp_path, monkeypatch, caplog, backend, flags, precision, warnings
):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n" * 2)
    monkeypatch.setattr(precisions, "CPUINFO", tmp_path / "cpuinfo")
    rewrite(onnx_dir, tmp_path, {"precision": precision})
    with caplog.at_level(logging.WARNING):
        open_network(tmp_path, backend=backend)
    found = [record for record in caplog.records if "no VNNI instructions" in record.getMessage()]
    assert len(found) == warnings


def test_the_backends_take_as_many_threads_as_pytorch_has(open_network, onnx_dir):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        openvino = open_network(onnx_dir, backend="openvino")
        onnxruntime = open_network(onnx_dir, backend="onnxruntime")
    finally:
        torch.set_num_threads(before)
    compiled = openvino.request.get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert onnxruntime.session.get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize("first", ["damoyolo.backends.openvino", "damoyolo_handler"])
def test_openvino_reports_nothing_and_leaves_no_files_in_the_home_folder(project_dir, tmp_path, first):
    script = (
        f"import sys; import {first}; import openvino, openvino.tools.ovc; "
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry.')]; "
        "assert sys.modules['openvino.torch'] is None"
    )
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(project_dir / "handler"), "PATH": "/usr/bin"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "intel").exists()


CLOSE_TWO_NETWORKS = """
import gc
import signal

import torch

from damoyolo.backends.openvino import OpenVINOBackend
from damoyolo.config import ServingConfig
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS

config = ServingConfig.from_mapping({"variant": "T", "class_names": ["one"], "input_size_hw": [64, 64]})
network = build_model(VARIANTS["T"], 1, folded=True).requires_grad_(False)
backends = [OpenVINOBackend(network, config, torch.device("cpu")) for _ in range(2)]
while backends:
    backends.pop(0)  # the first to be opened is the first to be closed
    gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


def test_a_process_that_has_closed_two_openvino_networks_survives_a_signal(project_dir):
    done = subprocess.run(
        [sys.executable, "-c", CLOSE_TWO_NETWORKS],
        env={"PYTHONPATH": str(project_dir / "handler"), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
