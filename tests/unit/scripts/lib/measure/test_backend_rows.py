"""Which rows of the table a machine can run, and why not the others."""

from dataclasses import replace

import pytest

from lib.measure.backend_rows import LIBRARIES, ROWS, Machine, reason_not_run, rows_of

from damoyolo.config import ServingConfig

ALL_LIBRARIES = frozenset(name for names in LIBRARIES.values() for name in names)
EVERYTHING = Machine(True, ALL_LIBRARIES, onnxruntime_has_cuda=True, cpu_computes_bf16=True)


def not_run(machine, *, has_int8_file=True):
    """The reasons, by device and name, of the rows that have one."""
    return {
        (row.device, row.name): reason
        for row in ROWS
        if (reason := reason_not_run(row, machine, has_int8_file=has_int8_file)) is not None
    }


def test_the_rows_of_a_device_have_names_of_their_own():
    for device in ("cpu", "cuda"):
        names = [row.name for row in rows_of(device)]
        assert names[0] == "pytorch fp32"
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.device} {row.name}")
def test_the_settings_of_a_row_are_accepted(row):
    ServingConfig(backend=row.backend, precision=row.precision)


def test_a_machine_with_everything_runs_every_row():
    assert not_run(EVERYTHING) == {}


def test_without_a_gpu_exactly_its_rows_say_so():
    assert not_run(replace(EVERYTHING, has_gpu=False)) == {
        ("cuda", row.name): "no GPU" for row in rows_of("cuda")
    }


def test_without_an_int8_file_the_quantised_rows_say_so():
    reasons = not_run(EVERYTHING, has_int8_file=False)
    assert set(reasons.values()) == {"no INT8 file given"}
    assert set(reasons) == {(row.device, row.name) for row in ROWS if row.quantised}
    assert len(reasons) == 4


@pytest.mark.parametrize("library", ["tensorrt", "openvino", "onnxruntime", "onnx"])
def test_a_missing_library_is_named_by_the_rows_that_need_it(library):
    reasons = not_run(replace(EVERYTHING, libraries=ALL_LIBRARIES - {library}))
    assert set(reasons.values()) == {f"{library} not installed"}
    needing = {backend for backend, names in LIBRARIES.items() if library in names}
    assert set(reasons) == {(row.device, row.name) for row in ROWS if row.backend in needing}


def test_onnx_runtime_without_cuda_runs_no_gpu_row():
    assert not_run(replace(EVERYTHING, onnxruntime_has_cuda=False)) == {
        ("cuda", "onnxruntime fp32"): "onnxruntime without CUDA"
    }


def test_a_cpu_without_bfloat16_runs_no_bfloat16_row():
    reasons = not_run(replace(EVERYTHING, cpu_computes_bf16=False))
    assert set(reasons) == {
        ("cpu", name) for name in ("pytorch bf16", "openvino bf16", "openvino int8, rest bf16")
    }
    assert set(reasons.values()) == {"CPU without bfloat16"}


def test_this_machine_has_pytorch():
    machine = Machine.here()
    assert reason_not_run(rows_of("cpu")[0], machine, has_int8_file=False) is None
