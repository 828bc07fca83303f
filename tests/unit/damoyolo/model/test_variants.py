"""The variants as data, and the networks built from them, against the published structure."""

import json

import pytest
import torch

from damoyolo.errors import ConfigError
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS, get_variant

ALL_VARIANTS = ("T", "S", "M", "L", "Ns", "Nm", "Nl", "N")


def build_without_values(name, *, folded=False):
    with torch.device("meta"):
        return build_model(VARIANTS[name], 80, folded=folded)


def test_all_published_variants_are_there():
    assert sorted(VARIANTS) == sorted(ALL_VARIANTS)
    assert all(name == spec.name for name, spec in VARIANTS.items())


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_keys_shapes_types_and_order_are_those_of_the_official_checkpoints(name, model_dir):
    expected = json.loads((model_dir / f"state_dict_{name}.json").read_text())
    found = [
        [key, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in build_without_values(name).state_dict().items()
    ]
    assert found == expected


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_parameter_counts_are_the_measured_ones(name, variant_facts):
    measured = variant_facts["variants"][name]["measured"]
    trained, folded = build_without_values(name), build_without_values(name, folded=True)
    assert sum(parameter.numel() for parameter in trained.parameters()) == measured["params_unfused"]
    # Upstream fuses RepConv alone: its two norm parameters a channel are one bias here, and the scales go.
    norm_channels = sum(
        tensor.numel()
        for key, tensor in trained.state_dict().items()
        if key.endswith("running_var") and ".rbr_" not in key
    )
    folded_count = sum(parameter.numel() for parameter in folded.parameters())
    assert folded_count + norm_channels + 3 == measured["params_deploy"]


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_sizes_and_channels_are_the_published_ones(name, variant_facts):
    facts, spec = variant_facts["variants"][name], VARIANTS[name]
    assert list(spec.input_size_hw) == facts["input_size"]
    assert list(spec.backbone.out_channels) == facts["neck"]["in_channels"]
    assert list(spec.neck_channels) == facts["head"]["in_channels"]
    assert spec.reg_max == facts["head"]["reg_max"]


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'XL'.*T, S, M, L, Ns, Nm, Nl, N"):
        get_variant("XL")
    assert get_variant("Nm") is VARIANTS["Nm"]
