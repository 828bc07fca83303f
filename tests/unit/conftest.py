"""Reference values of the network (golden weights, inputs, outputs), the demo archive and its images."""

import functools
import importlib.util
import json

import pytest
import torch
import yaml

from damoyolo.backends import ONNX_FILE
from damoyolo.model.checkpoint import load_checkpoint, save_packaged
from damoyolo.model.damoyolo import build_model
from damoyolo.model.fold import fold_state_dict
from damoyolo.model.variants import VARIANTS


@pytest.fixture(scope="session")
def model_dir(shared_dir):
    return shared_dir / "model"


@pytest.fixture(scope="session")
def golden(model_dir):
    """The module that makes the golden weights and inputs and compares outputs."""
    spec = importlib.util.spec_from_file_location("golden", model_dir / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def variant_facts(model_dir):
    facts = json.loads((model_dir / "variants.json").read_text())
    return facts


@pytest.fixture(scope="session")
def golden_state_dict(golden, model_dir):
    """The golden weights of a variant, as trained."""

    @functools.cache
    def load(name):
        filled = golden.fill(golden.load_spec(model_dir / f"state_dict_{name}.json"))
        return {key: torch.from_numpy(array) for key, array in filled.items()}

    return load


@pytest.fixture(scope="session")
def golden_model(golden_state_dict):
    """A variant with its golden weights, as trained or folded."""

    @functools.cache
    def load(name, folded):
        state_dict = golden_state_dict(name)
        model = build_model(VARIANTS[name], 80, folded=folded)
        model.load_state_dict(fold_state_dict(state_dict) if folded else state_dict, strict=True)
        return model.requires_grad_(False)

    return load


@pytest.fixture(scope="session")
def golden_images(golden):
    """The golden image in the size of a variant: (1, 3, H, W) float32, 0..255; a key, another image."""

    def make(name, key=0):
        return torch.from_numpy(golden.input_tensor(*VARIANTS[name].input_size_hw, key))

    return make


@pytest.fixture(scope="session")
def golden_onnx_dir(golden_model, tmp_path_factory):
    """A folder with the ONNX form of a variant with its golden weights, classes named "0" to "79"."""

    @functools.cache
    def export(name):
        from lib.onnx.export import export_onnx

        folder = tmp_path_factory.mktemp(name)
        export_onnx(golden_model(name, True), folder / ONNX_FILE)
        return folder

    return export


@pytest.fixture(scope="session")
def demo_settings():
    """The `handler:` section for the demo weights, in float32."""
    return {"variant": "S", "class_names": ["Platelets", "RBC", "WBC"], "precision": "fp32"}


@pytest.fixture(scope="session")
def demo_archive_dir(project_dir, demo_settings, tmp_path_factory):
    """A folder like an unpacked archive of the demo weights."""
    from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE

    folder = tmp_path_factory.mktemp("archive")
    checkpoint = load_checkpoint(project_dir / "model_store/weights/damoyolo_s_bccd.pth")
    save_packaged(folder / WEIGHTS_FILE, checkpoint)
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump({"handler": demo_settings}))
    return folder


@pytest.fixture(scope="session")
def smears(project_dir):
    """JPEG images of drawn blood smears."""
    return [path.read_bytes() for path in sorted((project_dir / "tests/data/smears").glob("*.jpg"))]
