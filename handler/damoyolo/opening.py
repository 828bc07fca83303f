"""Open the service of an unpacked archive in a worker process, whichever server the worker belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from damoyolo.config import (
    DEFAULT_RESPONSE_TIMEOUT_S,
    MANIFEST_FILE,
    MAX_BATCH_SECONDS,
    SETTINGS_FILE,
    ServingConfig,
)
from damoyolo.cores import usable_cores
from damoyolo.cuda.blocking_sync import enable_blocking_sync
from damoyolo.cuda.kernel_cache import use_compiled_kernels
from damoyolo.cuda.startup_lock import exclusive_device_lock
from damoyolo.detector import WEIGHTS_FILE, Detector
from damoyolo.failures import is_alive
from damoyolo.inference_answer import ModelIdentity
from damoyolo.model_card import describe_model
from damoyolo.service import DetectionService
from damoyolo.time_budget import SHARE_OF_RESPONSE_TIMEOUT


def open_service(
    model_dir: Path,
    device: torch.device,
    *,
    workers: int,
    settings: Mapping[str, Any] | None = None,
    model: ModelIdentity | None = None,
    max_response_bytes: int | None = None,
) -> DetectionService:
    """The service of an unpacked archive, warmed up. Call it once in a process, first of all.

    workers: of all devices; on a CPU each takes its share of the cores.
    settings: the content of model-config.yaml, if not that of the archive.
    model: how answers name the model, if not as in the archive's manifest.
    max_response_bytes: the largest answer that the server sends; the archive's setting may be lower.

    Raises:
        ConfigError, CheckpointError: settings and weights of the archive do not fit together.
    """
    if settings is None:
        settings = yaml.safe_load((model_dir / SETTINGS_FILE).read_text())
    serving = dict(settings.get("handler") or {})
    config = ServingConfig.from_mapping(serving)
    if max_response_bytes is not None:
        serving["max_response_bytes"] = min(config.max_response_bytes, max_response_bytes)
    # Before the server gives up a batch that takes too long, which costs all requests of the batch.
    serving.setdefault("max_batch_seconds", _batch_seconds(settings))
    if int(settings.get("batchSize") or 1) > 1:
        # A backend may compile for several images at the first batch of them: not while requests wait.
        serving.setdefault("warmup_batch_sizes", [1, 2])
    share_machine(device, config, workers)
    if device.type == "cuda":
        use_compiled_kernels(model_dir)
    with exclusive_device_lock(device):
        detector = Detector.from_settings(serving, model_dir / WEIGHTS_FILE, device)
        detector.warm_up(detector.config.warmup_batch_sizes)
        is_alive(device)
    model = model or read_identity(model_dir)
    card = describe_model(detector, model_dir / WEIGHTS_FILE, model.version)
    return DetectionService(detector, json.dumps(card).encode("ascii"), model)


def read_identity(model_dir: Path) -> ModelIdentity:
    """Name and version in the manifest of an unpacked archive."""
    manifest = json.loads((model_dir / MANIFEST_FILE).read_text())["model"]
    return ModelIdentity(str(manifest["modelName"]), str(manifest.get("modelVersion", "")))


def share_machine(device: torch.device, config: ServingConfig, workers: int) -> None:
    """Take a worker's share of the cores. Call before the detector: backends take PyTorch's threads."""
    cores = usable_cores()
    if device.type == "cpu":
        # More threads than cores would slow all workers down.
        torch.set_num_threads(config.compute_threads or max(1, cores // workers))
        return
    if config.cuda_sync == "blocking" or (config.cuda_sync == "auto" and 2 * workers > cores):
        enable_blocking_sync(device)
    torch.cuda.set_device(device)


def _batch_seconds(settings: Mapping[str, Any]) -> float:
    """The time in which a batch may begin work."""
    seconds = float(settings.get("responseTimeout") or DEFAULT_RESPONSE_TIMEOUT_S)
    return min(MAX_BATCH_SECONDS, SHARE_OF_RESPONSE_TIMEOUT * seconds)
