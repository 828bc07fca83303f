"""Fusions: each gives the values of the plain network, and leaves none of the blocks that it replaces."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from damoyolo.cuda import fuse as fuse_module
from damoyolo.cuda.fuse import FuseOptions, fuse, merge_convs
from damoyolo.cuda.kernels import pixel_stride
from damoyolo.cuda.kernels.pointwise import pointwise_conv
from damoyolo.model.damoyolo import build_model
from damoyolo.model.layers import Focus, LayerFactory, SpatialPyramidPooling
from damoyolo.model.neck import FusionStage
from damoyolo.model.pixel_stem import focus_weight_on_pixels
from damoyolo.model.variants import VARIANTS
from damoyolo.structures import RawPredictions

TOLERANCE = 1e-4  # of a tensor's largest value, in float32
FUSIONS = [field.name for field in dataclasses.fields(FuseOptions)]
NONE = FuseOptions(**dict.fromkeys(FUSIONS, False))
FAMILIES = ["S", "T", "M", "Ns"]
CLASSES = 3
GPU_SIZE_HW = (128, 160)


def only(name):
    """One fusion; or "none" of them, or "all"."""
    if name == "all":
        return FuseOptions()
    return NONE if name == "none" else dataclasses.replace(NONE, **{name: True})


@functools.cache
def make_model(name):
    """A folded network whose values neither fade nor blow up on the way, so that every block counts."""
    torch.manual_seed(7)
    model = build_model(VARIANTS[name], CLASSES, folded=True).requires_grad_(False)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
        assert conv.bias is not None
        nn.init.uniform_(conv.bias, -0.1, 0.1)
    convs[0].weight /= 128  # of values 0..255
    return model


@functools.cache
def make_pixels(size_hw=(64, 96)):
    """(2, 3, H, W) uint8."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (2, 3, *size_hw), dtype=torch.uint8, generator=generator)
    return pixels.to(memory_format=torch.channels_last)


@functools.cache
def plain_predictions(name, size_hw=(64, 96)):
    predictions = make_model(name)(make_pixels(size_hw).float())
    return predictions


def largest_difference(found, expected):
    """Over all tensors, as a part of a tensor's largest value."""
    pairs = zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True)
    return max(((a.cpu().float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("fused", ["none", *FUSIONS, "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_fusion_alone_and_all_together_give_the_values_of_the_plain_network(name, fused):
    expected = plain_predictions(name)
    for tensor in [*expected[0], *expected[1]]:  # of which the pixels decide a good part
        assert tensor.std(dim=(0, 2, 3)).mean() > 100 * TOLERANCE * tensor.abs().max()
    found = fuse(make_model(name), only(fused))(make_pixels())
    assert largest_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["L", "N"])
def test_variants_with_more_blocks_or_another_stem_agree_as_well(name):
    assert largest_difference(fuse(make_model(name))(make_pixels()), plain_predictions(name)) < TOLERANCE


@pytest.mark.parametrize("fused", ["none", "all"])
def test_pixels_of_any_type_and_layout_give_the_same(fused):
    model, expected = fuse(make_model("T"), only(fused)), plain_predictions("T")
    for pixels in (make_pixels().contiguous(), make_pixels().float(), make_pixels().double().contiguous()):
        assert largest_difference(model(pixels), expected) < TOLERANCE
    between = make_pixels().float() + 0.4
    assert largest_difference(model(between), make_model("T")(between)) < TOLERANCE


@pytest.mark.parametrize("fused", ["none", "all"])
def test_a_fused_network_can_be_converted(fused):
    model = fuse(make_model("T"), only(fused)).to(torch.bfloat16)
    found = model(make_pixels())
    assert {tensor.dtype for level in found for tensor in level} == {torch.bfloat16}
    assert largest_difference(found, plain_predictions("T")) < 0.1


def test_the_network_itself_is_left_alone():
    model = copy.deepcopy(make_model("T"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = fuse(model)
    for tensor in fused.state_dict().values():
        tensor.zero_()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_network_as_trained_is_refused():
    with pytest.raises(ValueError, match="folded=True"):
        fuse(build_model(VARIANTS["Ns"], CLASSES))


@pytest.mark.parametrize("name", ["S", "M"])
def test_a_fusion_replaces_its_blocks_and_no_other_does(name):
    fusion_of = {
        Focus: "stem",
        SpatialPyramidPooling: "pooling",
        nn.Upsample: "pointwise",
        FusionStage: "pointwise",
    }
    for fused in FUSIONS:
        kinds = {type(module) for module in fuse(make_model(name), only(fused)).modules()}
        for block, fusion in fusion_of.items():
            assert (block in kinds) == (fusion != fused)


@pytest.mark.parametrize("name", ["S", "M"])
def test_no_convolution_of_torch_is_left_but_the_depthwise_ones_of_the_mobile_variants(name):
    assert not any(isinstance(module, nn.Conv2d) for module in fuse(make_model(name)).modules())
    left = [module for module in fuse(make_model("Ns")).modules() if isinstance(module, nn.Conv2d)]
    assert left
    assert all(conv.groups == conv.in_channels for conv in left)


@pytest.mark.parametrize("name", [*FAMILIES, "L", "N"])
def test_the_kernel_for_1x1_convolutions_is_given_only_what_it_takes(name, monkeypatch):
    calls = []

    def checked(inputs, weight, bias, activation, upsampled, out_channels):
        assert len(inputs) <= 5
        assert not any(x.shape[1] % 8 for x in inputs)
        assert not (upsampled and upsampled[0])
        assert weight.is_contiguous()
        for x in inputs:
            pixel_stride(x)  # raises unless the memory is a list of pixels
        calls.append(upsampled)
        return pointwise_conv(inputs, weight, bias, activation, upsampled, out_channels)

    monkeypatch.setattr(fuse_module, "pointwise_conv", checked)
    model = fuse(make_model(name)).to(memory_format=torch.channels_last)
    model(make_pixels())
    assert calls.count((False, False, True)) == calls.count((False, True)) == 1
    assert len(calls) >= 11


def test_a_convolution_of_focus_becomes_one_of_pixels():
    torch.manual_seed(0)
    focus = Focus(5, nn.Identity, LayerFactory(folded=True)).double().requires_grad_(False)
    conv, images = focus.conv.conv, torch.rand(2, 3, 12, 18, dtype=torch.float64)
    found = F.conv2d(images, focus_weight_on_pixels(conv.weight), conv.bias, stride=2, padding=2)
    torch.testing.assert_close(found, focus(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_merged_convolutions_give_both_outputs_and_then_zeros(kernel_size):
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, n, kernel_size, padding=kernel_size // 2).requires_grad_(False) for n in (3, 7)]
    x = torch.randn(2, 4, 5, 6)
    found = merge_convs(convs, 8)(x)
    assert found.shape[1] == 16
    torch.testing.assert_close(found[:, :10], torch.cat([conv(x) for conv in convs], dim=1))
    assert not found[:, 10:].any()


def test_the_predictions_of_a_level_are_views_of_one_tensor_with_channels_in_eights():
    class_logits, distance_logits = fuse(make_model("S"))(make_pixels())
    for classes, distances in zip(class_logits, distance_logits, strict=True):
        assert classes.untyped_storage().data_ptr() == distances.untyped_storage().data_ptr()
        assert (classes.shape[1], distances.shape[1]) == (CLASSES, 68)
        assert pixel_stride(classes) == pixel_stride(distances) == 72


def on_cuda(model, dtype):
    return model.to("cuda", dtype, memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "fused", "dtype"),
    [
        *[("S", fused, torch.float16) for fused in ("none", *FUSIONS, "all")],
        *[("S", "all", dtype) for dtype in (torch.float32, torch.bfloat16)],
        *[(name, "all", torch.float16) for name in ("T", "M", "L", "Ns", "N")],
    ],
)
@torch.inference_mode()
def test_fusions_agree_with_the_plain_network_on_a_gpu(name, fused, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected, pixels = plain_predictions(name, GPU_SIZE_HW), make_pixels(GPU_SIZE_HW).cuda()
    found = on_cuda(fuse(make_model(name), only(fused)), dtype)(pixels)
    plain = on_cuda(copy.deepcopy(make_model(name)), dtype)(
        pixels.to(dtype, memory_format=torch.channels_last)
    )
    # The plain network in the same type says how far rounding alone leads away from float32 on the CPU.
    assert largest_difference(found, expected) < 3 * largest_difference(plain, expected) + TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_cuda_graph_of_a_fused_network_replays_its_values(name):
    model = on_cuda(fuse(make_model(name)), torch.float16)
    pixels = torch.zeros_like(make_pixels(GPU_SIZE_HW), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(pixels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = model(pixels)
    pixels.copy_(make_pixels(GPU_SIZE_HW))
    graph.replay()
    eager = RawPredictions(*(tuple(tensor.cpu().float() for tensor in level) for level in model(pixels)))
    assert largest_difference(replayed, eager) < 1e-2
