"""The self-check of archives: what differs from the weights as trained is found, wherever it went wrong."""

import dataclasses
import hashlib
import io

import pytest
import torch
import yaml

from lib.archive.members import copy_archive
from lib.cli import ScriptError
from lib.packaging.builder import ArchiveRequest, build_archive
from lib.packaging.verify import outputs_as_trained, probe_pixels, verify_archive
from lib.paths import HANDLER_DIR

from damoyolo.model.checkpoint import Checkpoint, load_checkpoint, save_packaged
from damoyolo.model.damoyolo import build_model
from damoyolo.model.fold import fold_state_dict
from damoyolo.model.variants import VARIANTS

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def checkpoint():
    """A small network as trained, with statistics that folding must not forget."""
    torch.manual_seed(0)
    model = build_model(VARIANTS["Ns"], len(NAMES), folded=False)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.3, 1.7)
        elif name.endswith("scale"):
            tensor.fill_(1.1)
    return Checkpoint(model.state_dict(), VARIANTS["Ns"], len(NAMES))


@pytest.fixture(scope="module")
def archive(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    torch.save(checkpoint.state_dict, folder / "trained.pth")
    request = ArchiveRequest(
        weights=str(folder / "trained.pth"),
        class_names=NAMES,
        output_dir=folder,
        serving={"backend": "pytorch"},
    )
    return build_archive(request).path  # which verifies it


def packaged(checkpoint, change):
    """The packaged weights after a change of the folded tensors."""
    folded = fold_state_dict(checkpoint.state_dict)
    change(folded)
    buffer = io.BytesIO()
    content = {
        "format": "damoyolo-folded-1",
        "variant": checkpoint.variant.name,
        "num_classes": checkpoint.num_classes,
        "model": folded,
    }
    torch.save(content, buffer)
    return buffer.getvalue()


def one_weight(folded):
    folded["backbone.block_list.0.conv.conv1.weight"].view(-1)[7] += 1e-4


def class_order(folded):
    for name, tensor in folded.items():
        if name.startswith("head.gfl_cls"):
            folded[name] = tensor[[1, 0, 2]].contiguous()


@pytest.mark.parametrize("change", [one_weight, class_order])
def test_packaged_weights_that_are_not_those_of_the_checkpoint_are_found(
    checkpoint, archive, tmp_path, change
):
    broken = copy_archive(archive, tmp_path / "x.mar", {"damoyolo.pth": packaged(checkpoint, change)})
    with pytest.raises(ScriptError, match=r"other values than the folded weights in \d+ of"):
        verify_archive(broken, checkpoint, NAMES)


def test_another_variant_than_the_checkpoint_s_is_found(checkpoint, archive, tmp_path):
    other = Checkpoint(build_model(VARIANTS["Nm"], 3, folded=False).state_dict(), VARIANTS["Nm"], 3)
    save_packaged(tmp_path / "x.pth", other)
    content = (tmp_path / "x.pth").read_bytes()
    broken = copy_archive(archive, tmp_path / "x.mar", {"damoyolo.pth": content})
    with pytest.raises(ScriptError, match="packed as Nm with 3 classes; the weights are Ns"):
        verify_archive(broken, checkpoint, NAMES)


def wrong_epsilon(monkeypatch):
    monkeypatch.setattr("damoyolo.model.fold.BATCH_NORM_EPS", 1e-5)


def forgotten_scales(monkeypatch):
    def drop(state_dict):
        return {name: tensor for name, tensor in state_dict.items() if not name.startswith("head.scales.")}

    monkeypatch.setattr("damoyolo.model.fold.fold_scales", drop)


@pytest.mark.parametrize("fault", [wrong_epsilon, forgotten_scales])
def test_wrong_folding_is_found_although_the_weights_are_packed_as_folded(
    checkpoint, archive, tmp_path, monkeypatch, fault
):
    fault(monkeypatch)
    weights = packaged(checkpoint, lambda _: None)
    sums = f"{hashlib.sha256(weights).hexdigest()}  damoyolo.pth\n".encode()
    broken = copy_archive(archive, tmp_path / "x.mar", {"damoyolo.pth": weights, "SHA256SUMS": sums})
    with pytest.raises(ScriptError, match="does not compute what the weights as trained do"):
        verify_archive(broken, checkpoint, NAMES)


def test_a_module_that_computes_something_else_is_found(checkpoint, archive, tmp_path):
    name = "damoyolo/model/head.py"
    text = (HANDLER_DIR / name).read_text()
    changed = text.replace("class_logits=tuple(conv(x) for", "class_logits=tuple(conv(x) * 1.001 for")
    assert changed != text
    broken = copy_archive(archive, tmp_path / "x.mar", {name: changed.encode()})
    with pytest.raises(ScriptError, match=r"\(plain\).*class_logits_0 is off by 0\.0"):
        verify_archive(broken, checkpoint, NAMES)


def test_other_class_names_than_the_request_s_are_found(checkpoint, archive, tmp_path):
    with pytest.raises(ScriptError, match="has the classes a, b, c; they should be b, a, c"):
        verify_archive(archive, checkpoint, ("b", "a", "c"))


def test_weights_that_predict_the_same_everywhere_are_refused(checkpoint):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in checkpoint.state_dict.items()}
    with pytest.raises(ScriptError, match="untrained or damaged"):
        outputs_as_trained(dataclasses.replace(checkpoint, state_dict=zeros), probe_pixels())


def test_an_archive_that_lacks_a_module_is_refused(checkpoint, archive, tmp_path):
    broken = copy_archive(archive, tmp_path / "x.mar", {"damoyolo/boxes.py": None})
    with pytest.raises(ScriptError, match=r"lacks damoyolo/boxes\.py"):
        verify_archive(broken, checkpoint, NAMES)


def test_weights_that_are_not_those_of_the_sums_are_refused_by_the_worker(checkpoint, archive, tmp_path):
    broken = copy_archive(archive, tmp_path / "x.mar", {"SHA256SUMS": b"0" * 64 + b"  damoyolo.pth\n"})
    with pytest.raises(ScriptError, match=r"(?s)Traceback.*SHA256SUMS says 000.*damaged or was exchanged"):
        verify_archive(broken, checkpoint, NAMES)


def test_an_archive_that_cannot_detect_is_refused_with_its_traceback(checkpoint, archive, tmp_path):
    settings = {"handler": {"variant": "Ns", "class_names": list(NAMES), "backend": "none"}}
    content = yaml.safe_dump(settings).encode()
    broken = copy_archive(archive, tmp_path / "x.mar", {"model-config.yaml": content})
    with pytest.raises(ScriptError, match=r"(?s)Traceback.*ConfigError"):
        verify_archive(broken, checkpoint, NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s", "t", "nm", "ns"])
def test_the_trained_weights_pass(shared_dir, tmp_path, name):
    weights = shared_dir / "weights" / f"damoyolo_{name}_bccd.pth"
    build_archive(ArchiveRequest(weights=str(weights), class_names=NAMES, output_dir=tmp_path))
    assert load_checkpoint(weights).num_classes == len(NAMES)
