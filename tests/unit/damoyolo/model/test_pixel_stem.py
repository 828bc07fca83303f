"""The stem as one convolution on pixels: the sums of Focus, for every variant that has it."""

import copy

import pytest
import torch

from damoyolo.model.damoyolo import build_model
from damoyolo.model.layers import Focus
from damoyolo.model.pixel_stem import join_focus
from damoyolo.model.variants import VARIANTS


@pytest.mark.parametrize("variant", ["T", "S", "M", "Ns"])
def test_the_joined_stem_gives_the_features_of_focus(variant):
    torch.manual_seed(0)
    model = build_model(VARIANTS[variant], 3, folded=True).double().requires_grad_(False)
    stem_of = lambda network: next(network.backbone.children())[0]  # noqa: E731
    before = stem_of(model)
    images = torch.randint(0, 256, (2, 3, 64, 96)).double()
    expected = before(images)
    names = set(model.state_dict())
    joined = join_focus(copy.deepcopy(model))
    found = stem_of(joined)
    # The same products, summed in another order: 108 of at most 255 * |w|, each rounded to 2**-53.
    torch.testing.assert_close(found(images), expected, rtol=0, atol=1e-10)
    assert set(joined.state_dict()) == names
    assert not any(isinstance(module, Focus) for module in joined.modules())
    assert any(isinstance(module, Focus) for module in model.modules()) == (variant != "Ns")
