"""Describe the hardware and the versions that figures depend on."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata
from typing import Any

import torch

PACKAGES = (
    "torch",
    "torchvision",
    "torchserve",
    "onnxruntime",
    "openvino",
    "pycocotools",
    "numpy",
    "pillow",
)


def environment() -> dict[str, Any]:
    """Versions of Python and of the installed packages, CPU and threads, GPUs and their libraries."""
    facts: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    facts |= {"cpu_threads": torch.get_num_threads(), "cpu": _cpu_name()}
    if torch.cuda.is_available():
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
        if importlib.util.find_spec("tensorrt") is not None:  # installed under several package names
            facts["tensorrt"] = importlib.import_module("tensorrt").__version__
    return facts


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
