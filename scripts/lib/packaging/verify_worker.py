"""Predict with the archive that is unpacked in the working folder, as a worker of the server would.

verify.py runs it in a fresh process: `python -c TEXT_OF_THIS_FILE PIXELS_NPY OUTPUTS_NPZ`. It imports nothing
of the project but what the archive holds.

PIXELS_NPY: (B, 3, H, W) uint8. OUTPUTS_NPZ gets class_logits_N and distance_logits_N of each level, with the
prefix `plain_` from the packaged weights in PyTorch, `served_` from the backend that the settings select,
both in float32; `backend` and `precision` of the latter; and `class_names`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

import damoyolo_handler
from damoyolo.backends.pytorch import PyTorchBackend
from damoyolo.config import SETTINGS_FILE
from damoyolo.detector import WEIGHTS_FILE, Detector
from damoyolo.model.checkpoint import load_packaged
from damoyolo.structures import Detections, RawPredictions

Network = Callable[[torch.Tensor], RawPredictions]


def main() -> None:
    """Write what the archive predicts; an error ends the process with its traceback."""
    here = Path.cwd()
    assert Path(damoyolo_handler.__file__).parent == here, damoyolo_handler.__file__
    pixels = torch.from_numpy(np.load(sys.argv[1]))
    # scripts/build_tensorrt.py compares the engine on the GPU.
    on_gpu = yaml.safe_load((here / SETTINGS_FILE).read_text())["handler"].get("backend") == "tensorrt"
    detector = Detector.from_archive_dir(here, "cpu", precision="fp32", backend="pytorch" if on_gpu else None)
    _require_detection(detector)
    plain = PyTorchBackend(load_packaged(here / WEIGHTS_FILE), torch.device("cpu"), "fp32")
    networks: dict[str, Network] = {"served": detector.raw_predictions, "plain": plain}
    outputs: dict[str, NDArray[Any]] = {
        "class_names": np.array(detector.config.class_names),
        "backend": np.array(detector.pipeline.name),
        "precision": np.array(detector.pipeline.precision),
    }
    for name, network in networks.items():
        for kind, levels in network(pixels)._asdict().items():
            for level, tensor in enumerate(levels):
                outputs[f"{name}_{kind}_{level}"] = tensor.float().numpy()
    np.savez(sys.argv[2], allow_pickle=False, **outputs)


def _require_detection(detector: Detector) -> None:
    """An encoded image passes all stages."""
    image = io.BytesIO()
    Image.effect_mandelbrot((640, 480), (-2, -1.2, 1, 1.2), 50).save(image, "PNG")
    (outcome,) = detector.detect([image.getvalue()], [detector.config.default_options()])
    assert isinstance(outcome, Detections), outcome
    assert np.isfinite(outcome.boxes_xyxy).all()


if __name__ == "__main__":
    main()
