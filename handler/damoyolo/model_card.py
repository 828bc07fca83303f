"""Describe the served model: what the management API answers to GET /models/NAME?customized=true."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import torch

from damoyolo.checksums import file_sha256
from damoyolo.config import ServingConfig
from damoyolo.detector import Detector
from damoyolo.response import CONTENT_TYPES
from damoyolo.response_formats import MAX_IMAGE_ID


def describe_model(detector: Detector, weights: Path, archive_version: str) -> dict[str, Any]:
    """The card as plain JSON values.

    weights: the file that the detector was made from.
    """
    config = detector.config
    return {
        "variant": config.variant,
        "class_names": list(config.class_names),
        "input_size_hw": list(detector.input_size_hw),
        "backend": detector.pipeline.name,
        "precision": detector.pipeline.precision,
        "device": _device_name(detector.device),
        "weights_sha256": file_sha256(weights),
        "image_formats": list(config.image_formats),
        "limits": _limits(config),
        "options": _options(config),
        "versions": _versions(archive_version, detector.pipeline.name),
        # Of the worker that answers: scripts/deploy.py tells by it which workers are idle.
        "worker_pid": os.getpid(),
    }


def _limits(config: ServingConfig) -> dict[str, Any]:
    """Every setting that bounds what a request may ask for; max_detections is the default of an option."""
    settings = config.to_mapping()
    return {
        name: value
        for name, value in settings.items()
        if name.startswith("max_") and name != "max_detections"
    }


def _options(config: ServingConfig) -> dict[str, Any]:
    threshold = {"minimum": 0.0, "maximum": 1.0}
    return {
        "score_threshold": {"default": config.score_threshold, **threshold},
        "iou_threshold": {"default": config.iou_threshold, **threshold},
        "max_detections": {
            "default": config.max_detections,
            "minimum": 1,
            "maximum": config.max_detections_limit,
        },
        "classes": {"default": "all", "names": "class_names", "ids": [0, len(config.class_names) - 1]},
        "class_agnostic": {"default": False},
        "format": {"default": "json", "accepted": list(CONTENT_TYPES)},
        "image_id": {"default": 0, "minimum": 0, "maximum": MAX_IMAGE_ID},
    }


def _versions(archive_version: str, backend: str) -> dict[str, str | None]:
    versions = {name: _package_version(name) for name in ("torchserve", "torch", "torchvision", "pillow")}
    # A backend's library is loaded by now; its package has one of several names.
    library = None if backend == "pytorch" else str(getattr(sys.modules.get(backend), "__version__", None))
    python = ".".join(map(str, sys.version_info[:3]))
    return {"archive": archive_version, "python": python, **versions, backend: library or torch.__version__}


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
