"""What is timed for a layer, as far as it runs without a CUDA device."""

import pytest
import torch

from lib.measure.cudnn_plans import ConvSpec, conv_reference, random_tensors
from lib.measure.layer_timing import served_call, variants_of
from lib.measure.layers import Layer, Pointwise, Stem
from lib.measure.roofline import Ceilings, roofline_row

CPU = torch.device("cpu")
CONV = ConvSpec(2, 16, 32, 6, 8, 3, 2, torch.float16, torch.float16)


def test_the_calls_of_the_own_kernels_have_the_outputs_of_the_layer():
    generator = torch.Generator(CPU).manual_seed(0)
    pointwise = Pointwise(2, ((16, 6, 8), (8, 3, 4)), (False, True), (24, 8), 6, 8, "relu")
    outputs = served_call(pointwise, CPU, generator)()
    assert [y.shape for y in outputs] == [(2, 24, 6, 8), (2, 8, 6, 8)]
    stem = Stem(2, 8, 12, 32, 24, "relu")
    assert served_call(stem, CPU, generator)().shape == (2, 24, 4, 6)


@pytest.mark.parametrize("addend", ["none", "before", "after"])
@pytest.mark.parametrize("types", [(torch.int8, torch.int8), (torch.int8, torch.float16)])
def test_random_tensors_give_results_of_about_the_range_of_their_type(types, addend):
    addend_type = torch.int8 if types[1] == torch.int8 else torch.float16
    spec = ConvSpec(2, 32, 48, 12, 16, 3, 1, *types, addend=addend, addend_type=addend_type)
    result = conv_reference(spec, random_tensors(spec, CPU, torch.Generator().manual_seed(0))).float()
    assert result.shape == spec.output_shape
    deviation = result.std().item() / (40 if types[1] == torch.int8 else 1)
    assert 0.1 < deviation < 4  # neither all zero nor all saturated


def test_variants_start_with_what_is_served_and_leave_the_stem_alone():
    assert [variant.kind for variant in variants_of(Stem(2, 8, 12, 32, 24, "relu"))] == ["served"]
    kinds = [variant.kind for variant in variants_of(CONV)]
    assert kinds[0] == "served"
    assert set(kinds) == {"served", "padded", "plans"}


def test_the_roofline_is_the_slower_of_operations_and_bytes():
    ceilings = Ceilings(fp16_flops=1e12, int8_flops=2e12, bytes_per_s=1e9)
    row = roofline_row(Layer(CONV, 3), ceilings)
    assert row["count"] == 3
    moved = 2 * (2 * 16 * 48 + 32 * 16 * 9 + 2 * 32 * 12)
    assert row["bound"] == "memory"
    assert row["limit_us"] == pytest.approx(moved / 1e9 * 1e6)
    fast_memory = Ceilings(fp16_flops=1e12, int8_flops=2e12, bytes_per_s=1e15)
    assert roofline_row(Layer(CONV, 1), fast_memory)["bound"] == "compute"
