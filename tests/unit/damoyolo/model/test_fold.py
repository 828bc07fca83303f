"""Folding: exact algebra on state dicts, and the folded network's agreement with the one as trained."""

import pytest
import torch
from torch import nn

from damoyolo.model.damoyolo import build_model
from damoyolo.model.fold import fold_state_dict
from damoyolo.model.layers import LayerFactory, RepConv
from damoyolo.model.variants import VARIANTS


def randomise(module):
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.rand_like(tensor) + 0.2 if "running_var" in name else torch.randn_like(tensor)
                )


@pytest.mark.parametrize("stride", [1, 2])
def test_a_rep_conv_becomes_one_convolution(stride):
    torch.manual_seed(stride)
    trained = nn.ModuleDict({"block": RepConv(5, 7, stride, LayerFactory(folded=False))}).eval()
    randomise(trained)
    folded = nn.ModuleDict({"block": LayerFactory(folded=True).rep_conv(5, 7, stride)})
    folded.load_state_dict(fold_state_dict(trained.state_dict()), strict=True)
    assert isinstance(folded["block"], nn.Conv2d)
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    trained, folded = trained.double(), folded.double()
    torch.testing.assert_close(folded["block"](x), trained["block"](x), rtol=1e-5, atol=1e-5)


def test_the_scale_of_a_level_multiplies_weight_and_bias():
    weight, bias = torch.randn(4, 3, 1, 1), torch.randn(4)
    folded = fold_state_dict(
        {
            "head.gfl_reg.1.weight": weight,
            "head.gfl_reg.1.bias": bias,
            "head.scales.1.scale": torch.tensor(2.0),
        }
    )
    assert set(folded) == {"head.gfl_reg.1.weight", "head.gfl_reg.1.bias"}
    assert torch.equal(folded["head.gfl_reg.1.weight"], 2 * weight)
    assert torch.equal(folded["head.gfl_reg.1.bias"], 2 * bias)


def test_folding_is_computed_in_float64():
    torch.manual_seed(0)
    module = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, bias=False), "bn": nn.BatchNorm2d(4)})
    randomise(module)
    trained = {f"layer.{name}": tensor for name, tensor in module.state_dict().items()}
    folded = fold_state_dict(trained)
    exact = {name.removeprefix("layer."): tensor.double() for name, tensor in trained.items()}
    factor = exact["bn.weight"] / (exact["bn.running_var"] + 1e-3).sqrt()
    assert torch.equal(folded["layer.conv.weight"], (exact["conv.weight"] * factor.view(-1, 1, 1, 1)).float())
    shift = exact["bn.bias"] - exact["bn.running_mean"] * factor
    assert torch.equal(folded["layer.conv.bias"], shift.float())


def test_folding_leaves_its_input_alone_and_shares_no_memory_with_it():
    trained = build_model(VARIANTS["Ns"], 3).state_dict()
    before = {name: tensor.clone() for name, tensor in trained.items()}
    folded = fold_state_dict(trained)
    for tensor in folded.values():
        tensor.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folded_state_dict_fits_the_folded_network_strictly(name):
    with torch.device("meta"):
        trained, folded = build_model(VARIANTS[name], 5), build_model(VARIANTS[name], 5, folded=True)
    expected = {key: (tensor.shape, tensor.dtype) for key, tensor in folded.state_dict().items()}
    found = {
        key: (tensor.shape, tensor.dtype) for key, tensor in fold_state_dict(trained.state_dict()).items()
    }
    assert found == expected
    kinds = {type(module) for module in folded.modules()}
    assert not kinds & {nn.BatchNorm2d, RepConv}


@pytest.mark.parametrize("name", ["S", "T", "M", "Ns"])
def test_the_folded_network_agrees_with_the_one_as_trained(name, golden_model, golden_images):
    images = golden_images(name)[..., :160, :160]
    trained, folded = golden_model(name, False)(images), golden_model(name, True)(images)
    largest = 0.0
    for a, b in zip([*trained[0], *trained[1]], [*folded[0], *folded[1]], strict=True):
        largest = max(largest, ((a - b).abs().max() / a.abs().max()).item())
    print(f"{name}: largest difference {largest:.1e} of the largest logit")
    assert largest < 1e-4
