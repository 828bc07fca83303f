"""Convolutions through cuDNN's graphs: what a specification says, and that plans agree with plain PyTorch."""

import dataclasses
import importlib.util

import pytest
import torch

from lib.measure.cudnn_plans import ConvGraph, ConvSpec, conv_reference, random_tensors

SPEC = ConvSpec(2, 32, 48, 12, 18, 3, 1, torch.int8, torch.int8)
CASES = [
    SPEC,
    dataclasses.replace(SPEC, kernel_size=1, out_type=torch.float16),
    dataclasses.replace(SPEC, stride=2, out_type=torch.float16, relu=False),
    dataclasses.replace(SPEC, addend="before", addend_type=torch.int8),
    dataclasses.replace(SPEC, addend="after", addend_type=torch.int8),
    dataclasses.replace(SPEC, addend="before", out_type=torch.float16),
    dataclasses.replace(SPEC, in_type=torch.float16, out_type=torch.float16, addend="before"),
    dataclasses.replace(SPEC, in_type=torch.float16, out_type=torch.float16, addend="after"),
]


def test_a_specification_knows_its_shapes():
    spec = dataclasses.replace(SPEC, stride=2, height=13)
    assert spec.input_shape == (2, 32, 13, 18)
    assert spec.weight_shape == (48, 32, 3, 3)
    assert spec.output_shape == (2, 48, 7, 9)
    expected = torch.nn.functional.conv2d(
        torch.zeros(spec.input_shape), torch.zeros(spec.weight_shape), None, 2, 1
    )
    assert expected.shape == spec.output_shape


def test_the_reference_scales_adds_activates_rounds_and_saturates():
    spec = ConvSpec(1, 1, 2, 1, 1, 1, 1, torch.int8, torch.int8, addend="before", addend_type=torch.int8)
    tensors = {
        "x": torch.full((1, 1, 1, 1), 10, dtype=torch.int8),
        "weight": torch.tensor([3, 100], dtype=torch.int8).view(2, 1, 1, 1),
        "scale": torch.tensor([0.1, 0.2]).view(1, 2, 1, 1),
        "bias": torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1),
        "addend": torch.tensor([1, 5], dtype=torch.int8).view(1, 2, 1, 1),
        "addend_scale": torch.full((1, 1, 1, 1), 0.5),
    }
    assert conv_reference(spec, tensors).flatten().tolist() == [2, 127]  # 3 - 1 + 0.5 to even; 200 + 1 + 2.5
    after = dataclasses.replace(spec, addend="after", out_type=torch.float16)
    tensors["bias"] = torch.tensor([-4.0, 1.0]).view(1, 2, 1, 1)
    assert conv_reference(after, tensors).flatten().tolist() == [0.5, 203.5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="needs nvidia-cudnn-frontend")
@pytest.mark.parametrize("spec", CASES, ids=str)
@torch.inference_mode()
def test_plans_agree_with_plain_pytorch_eagerly_and_captured(spec):
    graph = ConvGraph(spec, torch.device("cuda", 0), modes="A")
    tensors = random_tensors(spec, graph.device, torch.Generator("cuda").manual_seed(1))
    expected = conv_reference(spec, tensors).float()
    # An int8 result may fall to the other side of a half. fp16: half a step of the result, and of the sum
    # before an addition, each at most 2**-11 of the largest value; float32 sums are far below.
    tolerance = 1.0 if spec.out_type == torch.int8 else 2 * 2**-11 * expected.abs().max().item()
    checked = 0
    for index in range(min(graph.plan_count, 3)):
        try:
            workspace = torch.empty(max(1, graph.build(index)), dtype=torch.uint8, device="cuda")
        except Exception:  # cuDNN's own types; the other plans remain
            continue
        tensors["out"].fill_(77)
        graph.run(index, tensors, workspace)
        assert (tensors["out"].float() - expected).abs().max() <= tolerance
        tensors["out"].fill_(77)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            graph.run(index, tensors, workspace)
        captured.replay()
        assert (tensors["out"].float() - expected).abs().max() <= tolerance
        checked += 1
    assert checked
