"""The whole network against the golden outputs, and how it behaves in a batch and in other formats."""

import copy

import pytest
import torch

from damoyolo.boxes import decode_predictions
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS


def flatten(raw):
    return [*raw.class_logits, *raw.distance_logits]


ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("device", "memory_format"),
    [
        pytest.param("cpu", torch.contiguous_format, id="cpu"),
        pytest.param("cuda", torch.contiguous_format, id="cuda-nchw", marks=ON_A_GPU),
        pytest.param("cuda", torch.channels_last, id="cuda-nhwc", marks=ON_A_GPU),
    ],
)
@pytest.mark.parametrize("folded", [False, True], ids=["trained", "folded"])
@pytest.mark.parametrize("name", ["T", "S", "M", "Ns"])
def test_outputs_agree_with_the_golden_ones(
    name, folded, device, memory_format, golden, golden_model, golden_images, model_dir, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = copy.deepcopy(golden_model(name, folded)).to(device, memory_format=memory_format)
    images = golden_images(name).to(device).contiguous(memory_format=memory_format)
    with torch.inference_mode():
        scores, boxes_xyxy = decode_predictions(model(images))
    assert golden.check((scores, boxes_xyxy), model_dir / f"golden_{name}.npz")


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_predicts_three_levels_of_logits(name):
    spec = VARIANTS[name]
    with torch.device("meta"):
        raw = build_model(spec, 7, folded=True)(torch.empty(2, 3, 96, 160))
    sizes = [(12, 20), (6, 10), (3, 5)]
    assert [tuple(logits.shape) for logits in raw.class_logits] == [(2, 7, *size) for size in sizes]
    assert [tuple(logits.shape) for logits in raw.distance_logits] == [
        (2, 4 * (spec.reg_max + 1), *size) for size in sizes
    ]


@pytest.mark.parametrize("name", ["S", "Ns"])
def test_a_batch_gives_what_each_image_gives_alone(name, golden_model, golden_images):
    model = golden_model(name, True)
    images = torch.cat([golden_images(name, key)[..., :128, :192] for key in range(3)])
    batch = flatten(model(images))
    for index in range(3):
        for together, alone in zip(batch, flatten(model(images[index : index + 1])), strict=True):
            torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["S", "M", "Ns"])
def test_forward_leaves_weights_and_input_alone(name, golden_model, golden_images):
    model = golden_model(name, False)
    images = golden_images(name)[..., :128, :128].clone()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images_before, attributes_before = images.clone(), [set(vars(module)) for module in model.modules()]
    first, second = flatten(model(images)), flatten(model(images))
    assert all(map(torch.equal, first, second))
    assert torch.equal(images, images_before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == attributes_before


@pytest.mark.parametrize("name", ["S", "M", "Ns"])
def test_channels_last_changes_nothing_but_rounding(name, golden_model, golden_images):
    model = golden_model(name, True)
    images = golden_images(name)[..., :128, :192]
    expected = flatten(model(images))
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    found = flatten(other(images.contiguous(memory_format=torch.channels_last)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["M", "Ns"])
def test_bfloat16_weights_and_autocast_stay_near_float32(name, golden_model, golden_images):
    model = golden_model(name, True)
    images = golden_images(name)[..., :96, :96]
    expected = flatten(model(images))
    with torch.autocast("cpu", torch.bfloat16):
        by_autocast = flatten(model(images))
    by_weights = flatten(copy.deepcopy(model).to(torch.bfloat16)(images.to(torch.bfloat16)))
    for found in (by_autocast, by_weights):
        assert {tensor.dtype for tensor in found} == {torch.bfloat16}
        for a, b in zip(found, expected, strict=True):
            assert (a.float() - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("name", ["M", "Ns"])
def test_the_network_compiles_into_one_graph(name, golden_model, golden_images):
    model = golden_model(name, True)
    images = golden_images(name)[..., :64, :64]
    expected = flatten(model(images))
    found = flatten(torch.compile(model, backend="eager", fullgraph=True)(images))
    assert all(map(torch.equal, found, expected))
