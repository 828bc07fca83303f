"""Precisions of PyTorch: which are accepted where, and what auto selects."""

import pytest
import torch

from damoyolo.backends import precision as precisions
from damoyolo.backends.precision import cpu_sums_int8_exactly, resolve_precision
from damoyolo.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_precision_that_a_cpu_lacks_is_refused_with_those_it_has(precision):
    with pytest.raises(ConfigError, match=rf"'{precision}'; accepted on cpu are auto, fp32, amp, bf16"):
        resolve_precision(precision, CPU)


@pytest.mark.parametrize(("in_hardware", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bfloat16_only_where_the_cpu_computes_it(monkeypatch, in_hardware, expected):
    monkeypatch.setattr(precisions, "cpu_computes_bf16", lambda: in_hardware)
    assert resolve_precision("auto", CPU) == expected


def test_auto_takes_fp16_on_cuda():
    assert resolve_precision("auto", CUDA) == "fp16"


def test_another_kind_of_device_is_refused():
    with pytest.raises(ConfigError, match="cpu and cuda"):
        resolve_precision("auto", torch.device("meta"))


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx_vnni\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vbmi\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", True),
        (None, True),
    ],
)
def test_int8_is_exact_with_vnni_and_on_processors_that_are_not_x86(monkeypatch, tmp_path, cpuinfo, expected):
    monkeypatch.setattr(precisions, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        precisions.CPUINFO.write_text(cpuinfo)
    assert cpu_sums_int8_exactly() is expected
