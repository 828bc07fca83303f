"""An unpacked archive of a small untrained network, for tests that need a real detector quickly."""

import json

import torch

from lib.paths import HANDLER_DIR

from damoyolo.model.checkpoint import Checkpoint, save_packaged
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS

SETTINGS = {
    "variant": "Ns",
    "class_names": ["a", "b"],
    "input_size_hw": [64, 64],
    "backend": "pytorch",
    "precision": "fp32",
}


def write_tiny_archive(folder):
    """Write it into a new folder, with the project's modules."""
    folder.mkdir()
    torch.manual_seed(0)
    model = build_model(VARIANTS["Ns"], 2, folded=False)
    save_packaged(folder / "damoyolo.pth", Checkpoint(model.state_dict(), VARIANTS["Ns"], 2))
    (folder / "model-config.yaml").write_text(json.dumps({"handler": SETTINGS}))
    (folder / "damoyolo").symlink_to(HANDLER_DIR / "damoyolo")
    return folder
