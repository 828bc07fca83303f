"""Copies of an archive with other settings or another handler."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from damoyolo.config import graph_batch_sizes_up_to

SETTINGS_FILE = "model-config.yaml"
MANIFEST = "MAR-INF/MANIFEST.json"
EMPTY_HANDLER = Path(__file__).with_name("empty_handler.py")
SMALLEST_QUEUE = 256


def queue_size(batch_size: int, workers: int) -> int:
    """Requests that may wait: four rounds of what all workers take at once."""
    return max(SMALLEST_QUEUE, 4 * batch_size * workers)


@dataclass(frozen=True, order=True)
class BatchingSetting:
    """How the server batches: most requests of a batch, longest wait for it to fill in ms, workers."""

    batch_size: int
    delay_ms: int
    workers: int

    def model_settings(self) -> dict[str, Any]:
        """As keys of model-config.yaml."""
        return {
            "minWorkers": self.workers,
            "maxWorkers": self.workers,
            "batchSize": self.batch_size,
            "maxBatchDelay": self.delay_ms,
            "jobQueueSize": queue_size(self.batch_size, self.workers),
        }

    def serving_settings(self) -> dict[str, Any]:
        """As keys of its section `handler:`, so that batches need not be cut up or padded far."""
        return {"graph_batch_sizes": graph_batch_sizes_up_to(self.batch_size)}

    def __str__(self) -> str:
        return f"batch {self.batch_size}, delay {self.delay_ms} ms, workers {self.workers}"


def read_settings(archive: Path) -> dict[str, Any]:
    """The content of the archive's model-config.yaml."""
    with zipfile.ZipFile(archive) as opened:
        settings: dict[str, Any] = yaml.safe_load(opened.read(SETTINGS_FILE))
    return settings


def batching_of(settings: Mapping[str, Any]) -> BatchingSetting:
    """The batching part of a model-config.yaml."""
    return BatchingSetting(settings["batchSize"], settings["maxBatchDelay"], settings["minWorkers"])


def archive_with_setting(archive: Path, folder: Path, setting: BatchingSetting) -> Path:
    """A copy of the archive in `folder` that batches as the setting says."""
    settings = {**read_settings(archive), **setting.model_settings()}
    settings["handler"] = {**settings["handler"], **setting.serving_settings()}
    copy = folder / archive.name
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(copy, "w") as target:
        for item in source.infolist():
            if item.filename != SETTINGS_FILE:
                target.writestr(item, source.read(item))
        target.writestr(SETTINGS_FILE, yaml.safe_dump(settings, sort_keys=False))
    return copy


def empty_archive(archive: Path, folder: Path, setting: BatchingSetting, answer_bytes: int) -> Path:
    """An archive in `folder` of the same name and model, whose handler answers at once with so many bytes."""
    with zipfile.ZipFile(archive) as source:
        manifest = json.loads(source.read(MANIFEST))
    manifest["model"].pop("serializedFile", None)
    settings = {**read_settings(archive), **setting.model_settings(), "answer_bytes": answer_bytes}
    settings.pop("handler", None)
    copy = folder / archive.name
    with zipfile.ZipFile(copy, "w") as target:
        target.writestr(MANIFEST, json.dumps(manifest))
        target.writestr(manifest["model"]["handler"], EMPTY_HANDLER.read_bytes())
        target.writestr(SETTINGS_FILE, yaml.safe_dump(settings, sort_keys=False))
    return copy


def settings_text_with(text: str, setting: BatchingSetting) -> str:
    """The text of a model-config.yaml with this setting in it; comments stay, but for those in `handler:`."""
    serving = {**(yaml.safe_load(text)["handler"] or {}), **setting.serving_settings()}
    text = re.sub(r"^handler:.*\Z", "", text, flags=re.MULTILINE | re.DOTALL)
    for key, value in setting.model_settings().items():
        line = f"{key}: {value}"
        text, found = re.subn(rf"^{re.escape(key)}:.*$", line, text, flags=re.MULTILINE)
        if not found:
            text = f"{text.rstrip()}\n{line}\n"
    section = yaml.safe_dump({"handler": serving}, sort_keys=False, default_flow_style=None)
    return f"{text.rstrip()}\n{section}"
