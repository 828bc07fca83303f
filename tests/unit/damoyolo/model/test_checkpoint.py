"""Checkpoint files in every accepted form, and what is said about the others."""

import os
import pickle
from collections import OrderedDict

import pytest
import torch

from damoyolo.errors import CheckpointError, ConfigError
from damoyolo.model.checkpoint import Checkpoint, load_checkpoint, load_packaged, save_packaged
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS


@pytest.fixture(scope="module")
def trained():
    """The state dict of an Ns network for 3 classes, with values that tell the channels apart."""
    torch.manual_seed(0)
    model = build_model(VARIANTS["Ns"], 3)
    for key, tensor in model.state_dict().items():
        if "running" in key:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return dict(model.state_dict())


@pytest.fixture
def save(tmp_path):
    def write(content):
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        return path

    return write


@pytest.fixture
def packaged(trained, save, tmp_path):
    """The packaged form of `trained`."""
    save_packaged(tmp_path / "packaged.pth", load_checkpoint(save({"model": trained})))
    return tmp_path / "packaged.pth"


def equal_state_dicts(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_the_official_form_and_all_its_disguises_give_the_same_checkpoint(trained, save):
    prefixed = {f"module.{key}": tensor for key, tensor in trained.items()}
    shuffled = OrderedDict(sorted(trained.items(), reverse=True))
    as_trainer_writes = {"model": trained, "epoch": 3, "optimizer": {"state": {}}, "feature_loss": None}
    for content in ({"model": trained}, trained, {"model": prefixed}, prefixed, shuffled, as_trainer_writes):
        checkpoint = load_checkpoint(save(content))
        assert checkpoint.variant is VARIANTS["Ns"]
        assert checkpoint.num_classes == 3
        assert equal_state_dicts(checkpoint.state_dict, trained)


def test_float16_weights_become_float32(trained, save):
    halved = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in trained.items()}
    checkpoint = load_checkpoint(save({"model": halved}), "Ns")
    for key, tensor in checkpoint.state_dict.items():
        assert tensor.dtype == trained[key].dtype
        assert torch.equal(tensor, halved[key].to(tensor.dtype))


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_identified_from_its_keys_and_shapes(name, save):
    with torch.device("meta"):
        expected = build_model(VARIANTS[name], 11).state_dict()
    zeros = {key: torch.zeros(()).to(tensor.dtype).expand(tensor.shape) for key, tensor in expected.items()}
    checkpoint = load_checkpoint(save({"model": zeros}))
    assert checkpoint.variant is VARIANTS[name]
    assert checkpoint.num_classes == 11
    assert list(checkpoint.state_dict) == list(expected)


def test_the_extra_channel_of_an_older_head_is_cut_off_where_there_is_a_name_less(trained, save):
    older = {
        key: torch.cat([tensor, tensor[-1:] + 1]) if "gfl_cls" in key else tensor
        for key, tensor in trained.items()
    }
    assert load_checkpoint(save({"model": older})).num_classes == 4
    checkpoint = load_checkpoint(save({"model": older}), num_classes=3)
    assert checkpoint.num_classes == 3
    assert equal_state_dicts(checkpoint.state_dict, trained)


@pytest.mark.parametrize("num_classes", [0, 1, 4, 80])
def test_another_number_of_class_names_is_refused(num_classes, trained, save):
    with pytest.raises(
        CheckpointError, match=f"3 class channels, but {num_classes} class names.*3 names, or 2"
    ):
        load_checkpoint(save({"model": trained}), num_classes=num_classes)


def test_a_file_of_another_variant_is_refused_with_the_one_that_it_fits(trained, save):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(save({"model": trained}), "S")
    message = str(caught.value)
    for part in (
        "does not fit variant S",
        "missing: backbone.block_list.0.conv.conv.weight",
        "unexpected: backbone.block_list.0.conv.conv1.weight",
        "of another shape: backbone.block_list.5.block_list.1.conv1.conv.weight (80, 160, 1, 1) instead of",
        "it fits variant Ns",
    ):
        assert part in message
    assert len(message) < 1000


def test_differences_to_the_closest_variant_are_named_where_none_fits(trained, save):
    damaged = dict(trained)
    del damaged["neck.merge_3.conv1.bn.bias"]
    damaged["head.extra"] = torch.zeros(1)
    damaged["head.scales.0.scale"] = torch.zeros(2)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(save({"model": damaged}))
    message = str(caught.value)
    for part in (
        "the closest is Ns",
        "1 missing: neck.merge_3.conv1.bn.bias",
        "1 unexpected: head.extra",
        "1 of another shape: head.scales.0.scale (2,) instead of ()",
    ):
        assert part in message
    with pytest.raises(CheckpointError, match="nor does it fit any other"):
        load_checkpoint(save({"model": damaged}), "Ns")


def test_an_unknown_variant_is_a_wrong_setting(trained, save):
    with pytest.raises(ConfigError, match="'Q'"):
        load_checkpoint(save({"model": trained}), "Q")


def test_weights_that_are_not_finite_are_refused(trained, save):
    key = "neck.merge_7.conv3.conv.weight"
    broken = {**trained, key: torch.full_like(trained[key], torch.nan)}
    with pytest.raises(CheckpointError, match=f"not finite: {key}"):
        load_checkpoint(save({"model": broken}))


@pytest.mark.parametrize(
    "content", [{}, {"model": {}}, {"model": None}, [1, 2], 3, {"a": 1}, {1: torch.ones(1)}]
)
def test_files_without_a_state_dict_are_refused(content, save):
    with pytest.raises(CheckpointError, match="state dict"):
        load_checkpoint(save(content))


def test_a_state_dict_of_something_else_is_refused(save):
    with pytest.raises(CheckpointError, match=r"fits none of the variants.*missing.*unexpected: weight"):
        load_checkpoint(save({"weight": torch.ones(1)}))


def test_files_that_are_missing_cut_off_or_no_checkpoint_are_refused(trained, save, tmp_path):
    whole = save({"model": trained}).read_bytes()
    for damaged in (
        b"",
        b"hello world",
        b"\x80",
        b"\xff\xd8\xff\xe0" * 100,
        whole[:20],
        whole[:-100],
        whole[100:],
    ):
        path = tmp_path / "damaged.pth"
        path.write_bytes(damaged)
        for load in (load_checkpoint, load_packaged):
            with pytest.raises(CheckpointError, match=r"damaged\.pth"):
                load(path)
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="directory"):
        load_packaged(tmp_path)


class RunsACommand:
    """What a hostile file holds."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, save):
    trace = tmp_path / "trace"
    hostile = RunsACommand(f"touch {trace}")
    plain_pickle = tmp_path / "plain.pth"
    plain_pickle.write_bytes(pickle.dumps({"model": hostile}, protocol=2))
    for path in (save({"model": hostile}), plain_pickle):
        for load in (load_checkpoint, load_packaged):
            with pytest.raises(CheckpointError, match="safely"):
                load(path)
    assert not trace.exists()


def test_the_packaged_form_comes_back_as_the_network_that_was_trained(trained, packaged):
    model = load_packaged(packaged)
    reference = build_model(VARIANTS["Ns"], 3)
    reference.load_state_dict(trained)
    assert model.variant is VARIANTS["Ns"]
    assert model.num_classes == 3
    assert not model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    images = torch.rand(1, 3, 96, 64) * 255
    with torch.inference_mode():
        found, expected = model(images), reference(images)
    for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_equal_checkpoints_are_packaged_to_equal_bytes(trained, save, tmp_path):
    checkpoint = load_checkpoint(save({"model": trained}))
    # The same values in other memory: views of larger tensors, another memory format, other key objects.
    elsewhere = Checkpoint(
        {
            "".join(list(key)): torch.stack([tensor, tensor])[1].contiguous(
                memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
            )
            for key, tensor in checkpoint.state_dict.items()
        },
        checkpoint.variant,
        checkpoint.num_classes,
    )
    save_packaged(tmp_path / "one.pth", checkpoint)
    save_packaged(tmp_path / "two.bin", elsewhere)
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.bin").read_bytes()


def test_the_two_forms_are_not_taken_for_each_other(trained, save, packaged):
    with pytest.raises(CheckpointError, match="packaged form; accepted is a checkpoint as trained"):
        load_checkpoint(packaged)
    with pytest.raises(CheckpointError, match=r"not in the packaged form.*found None.*'damoyolo-folded-1'"):
        load_packaged(save({"model": trained}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "damoyolo-folded-0"}, "found 'damoyolo-folded-0'"),
        ({"variant": "Q"}, "variant 'Q'.*accepted are the variants T, S"),
        ({"variant": ["S"]}, "accepted are the variants"),
        ({"num_classes": 0}, "with 0 classes"),
        ({"variant": "Nm"}, "folded variant Nm.*of another shape"),
        ({"num_classes": 4}, "of another shape: head.gfl_cls"),
        ({"model": None}, "state dict"),
    ],
)
def test_a_packaged_file_that_contradicts_itself_is_refused(change, message, save, packaged):
    content = torch.load(packaged, weights_only=True)
    with pytest.raises(CheckpointError, match=message):
        load_packaged(save({**content, **change}))


def test_a_packaged_file_with_values_that_are_not_finite_is_refused(trained, save, packaged, tmp_path):
    content = torch.load(packaged, weights_only=True)
    content["model"]["head.gfl_reg.0.bias"][0] = torch.inf
    with pytest.raises(CheckpointError, match=r"not finite: head\.gfl_reg\.0\.bias"):
        load_packaged(save(content))
    key = "neck.merge_3.conv1.bn.running_var"
    negative = {**trained, key: torch.full_like(trained[key], -1)}
    with pytest.raises(CheckpointError, match="not finite"):
        save_packaged(tmp_path / "negative.pth", Checkpoint(negative, VARIANTS["Ns"], 3))
    assert not (tmp_path / "negative.pth").exists()


@pytest.mark.parametrize("name", ["T", "Nm", "Ns"])
def test_further_weights_load_with_their_variant_identified(name, shared_dir):
    checkpoint = load_checkpoint(shared_dir / "weights" / f"damoyolo_{name.lower()}_bccd.pth")
    assert (checkpoint.variant.name, checkpoint.num_classes) == (name, 3)
