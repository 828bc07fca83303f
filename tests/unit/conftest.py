"""Reference values of the network (golden weights, inputs, outputs), the demo archive and its images."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from damoyolo.backends import ONNX_FILE
from damoyolo.model.checkpoint import load_checkpoint, save_packaged
from damoyolo.model.damoyolo import DamoYolo, build_model
from damoyolo.model.fold import fold_state_dict
from damoyolo.model.variants import VARIANTS


@pytest.fixture(scope="session")
def model_dir(shared_dir: Path) -> Path:
    return shared_dir / "model"


@pytest.fixture(scope="session")
def golden(model_dir: Path) -> ModuleType:
    """The module that makes the golden weights and inputs and compares outputs."""
    spec = importlib.util.spec_from_file_location("golden", model_dir / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def variant_facts(model_dir: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((model_dir / "variants.json").read_text())
    return facts


@pytest.fixture(scope="session")
def golden_state_dict(golden: ModuleType, model_dir: Path) -> Callable[[str], dict[str, Tensor]]:
    """The golden weights of a variant, as trained."""

    @functools.cache
    def load(name: str) -> dict[str, Tensor]:
        filled = golden.fill(golden.load_spec(model_dir / f"state_dict_{name}.json"))
        return {key: torch.from_numpy(array) for key, array in filled.items()}

    return load


@pytest.fixture(scope="session")
def golden_model(golden_state_dict: Callable[[str], dict[str, Tensor]]) -> Callable[[str, bool], DamoYolo]:
    """A variant with its golden weights, as trained or folded."""

    @functools.cache
    def load(name: str, folded: bool) -> DamoYolo:
        state_dict = golden_state_dict(name)
        model = build_model(VARIANTS[name], 80, folded=folded)
        model.load_state_dict(fold_state_dict(state_dict) if folded else state_dict, strict=True)
        return model.requires_grad_(False)

    return load


@pytest.fixture(scope="session")
def golden_images(golden: ModuleType) -> Callable[..., Tensor]:
    """The golden image in the size of a variant: (1, 3, H, W) float32, 0..255; a key, another image."""

    def make(name: str, key: int = 0) -> Tensor:
        return torch.from_numpy(golden.input_tensor(*VARIANTS[name].input_size_hw, key))

    return make


@pytest.fixture(scope="session")
def golden_onnx_dir(
    golden_model: Callable[[str, bool], DamoYolo], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A folder with the ONNX form of a variant with its golden weights, classes named "0" to "79"."""

    @functools.cache
    def export(name: str) -> Path:
        from lib.onnx.export import export_onnx

        folder = tmp_path_factory.mktemp(name)
        export_onnx(golden_model(name, True), folder / ONNX_FILE)
        return folder

    return export


@pytest.fixture(scope="session")
def demo_settings() -> dict[str, Any]:
    """The `handler:` section for the demo weights, in float32."""
    return {"variant": "S", "class_names": ["Platelets", "RBC", "WBC"], "precision": "fp32"}


@pytest.fixture(scope="session")
def demo_archive_dir(
    project_dir: Path, demo_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder like an unpacked archive of the demo weights."""
    from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE

    folder = tmp_path_factory.mktemp("archive")
    checkpoint = load_checkpoint(project_dir / "model_store/weights/damoyolo_s_bccd.pth")
    save_packaged(folder / WEIGHTS_FILE, checkpoint)
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump({"handler": demo_settings}))
    return folder


@pytest.fixture(scope="session")
def smears(project_dir: Path) -> list[bytes]:
    """JPEG images of drawn blood smears."""
    return [path.read_bytes() for path in sorted((project_dir / "tests/data/smears").glob("*.jpg"))]
