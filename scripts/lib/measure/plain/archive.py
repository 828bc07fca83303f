"""The plain detector from an archive; and an archive of it for TorchServe's own `object_detector` handler.

After TorchServe's example of a Fast R-CNN: a model file with one class, a state dict, names of the classes.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
import yaml

from lib.archive.members import (
    BatchingSetting,
    copy_archive,
    read_manifest,
    read_settings,
    settings_with,
)
from lib.archive.reader import unpacked
from lib.measure.plain.detector import PlainDetector

from damoyolo.config import MANIFEST_FILE, SETTINGS_FILE, ServingConfig
from damoyolo.detector import WEIGHTS_FILE
from damoyolo.model.checkpoint import load_packaged

MODEL_FILE, STATE_FILE, DETECTOR_FILE = "plain_model.py", "plain_model.pth", "plain_detector.py"
# TorchServe's vision handlers import captum, which explains predictions; here nobody asks it to.
CAPTUM = {"captum/__init__.py": b"", "captum/attr.py": b"def IntegratedGradients(model):\n    return None\n"}


def open_plain_detector(folder: Path, device: torch.device) -> tuple[PlainDetector, tuple[str, ...]]:
    """The plain detector of an unpacked archive, and its class names."""
    config = ServingConfig.from_mapping(yaml.safe_load((folder / SETTINGS_FILE).read_text())["handler"])
    model = load_packaged(folder / WEIGHTS_FILE)
    input_size_hw = config.input_size_hw or model.variant.input_size_hw
    detector = PlainDetector(config.variant, len(config.class_names), input_size_hw)
    detector.network.load_state_dict(model.state_dict())
    return detector.eval().to(device), config.class_names


def plain_archive(archive: Path, folder: Path, setting: BatchingSetting) -> Path:
    """An archive in `folder` of the same name with the plain detector, for TorchServe's `object_detector`."""
    with unpacked(archive) as source:
        detector, class_names = open_plain_detector(source, torch.device("cpu"))
    state = io.BytesIO()
    torch.save(detector.state_dict(), state)
    manifest = read_manifest(archive)
    manifest["model"] |= {
        "handler": "object_detector",
        "modelFile": MODEL_FILE,
        "serializedFile": STATE_FILE,
    }
    settings = settings_with(read_settings(archive), setting)
    settings.pop("handler")
    arguments = (detector.network.variant.name, len(class_names), detector.input_size_hw)
    replaced: dict[str, bytes | None] = {
        MANIFEST_FILE: json.dumps(manifest).encode(),
        SETTINGS_FILE: yaml.safe_dump(settings).encode(),
        WEIGHTS_FILE: None,
        STATE_FILE: state.getvalue(),
        DETECTOR_FILE: Path(__file__).with_name("detector.py").read_bytes(),
        MODEL_FILE: (
            "from plain_detector import PlainDetector\n\n\nclass PlainModel(PlainDetector):\n"
            f"    def __init__(self):\n        super().__init__(*{arguments!r})\n"
        ).encode(),
        "index_to_name.json": json.dumps(dict(enumerate(class_names))).encode(),
        **CAPTUM,
    }
    return copy_archive(archive, folder / archive.name, replaced)
