"""Copy an archive with members replaced: other settings, or another handler."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lib.cli import ScriptError

from damoyolo.config import (
    DEFAULT_RESPONSE_TIMEOUT_S,
    MANIFEST_FILE,
    SETTINGS_FILE,
    graph_batch_sizes_up_to,
)

OPENING_MODULE = "damoyolo/opening.py"
SERVER_DEFAULTS = {"jobQueueSize": 100, "responseTimeout": DEFAULT_RESPONSE_TIMEOUT_S}  # TorchServe's
EMPTY_HANDLER = Path(__file__).with_name("empty_handler.py")
SMALLEST_QUEUE = 256


def queue_size(batch_size: int, workers: int) -> int:
    """Requests that may wait: four times what all workers take at once."""
    return max(SMALLEST_QUEUE, 4 * batch_size * workers)


@dataclass(frozen=True, order=True)
class BatchingSetting:
    """How the server batches: requests per batch at most, longest wait for one to fill in ms, workers."""

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
        """As keys of its section `handler:`; avoids splitting batches or padding them far."""
        return {"graph_batch_sizes": graph_batch_sizes_up_to(self.batch_size)}

    def __str__(self) -> str:
        return f"batch {self.batch_size}, delay {self.delay_ms} ms, workers {self.workers}"


@contextlib.contextmanager
def opened_archive(archive: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, open for reading.

    Raises:
        ScriptError: it cannot be read, is damaged, or lacks a member that is asked for.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            yield opened
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else str(error) or "it ends too early"
        raise ScriptError(
            f"cannot read the archive {archive}: {reason}; scripts/build_archive.py builds one"
        ) from error


def read_settings(archive: Path) -> dict[str, Any]:
    """The content of the archive's model-config.yaml.

    Raises:
        ScriptError: the archive or the file cannot be read.
    """
    with opened_archive(archive) as opened:
        content = opened.read(SETTINGS_FILE)
    return parse_settings(content, archive)


def parse_settings(content: bytes, archive: Path) -> dict[str, Any]:
    """The content of a model-config.yaml; `archive` is named in errors.

    Raises:
        ScriptError: it is not YAML of the expected form.
    """
    try:
        settings = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ScriptError(f"{SETTINGS_FILE} of {archive} is not YAML: {reason}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("handler", {}), dict):
        raise ScriptError(
            f"{SETTINGS_FILE} of {archive} holds no settings; accepted are keys with values, among them "
            "handler: with keys of its own"
        )
    return settings


def read_manifest(archive: Path) -> dict[str, Any]:
    """The archive's manifest.

    Raises:
        ScriptError: the archive or the manifest cannot be read.
    """
    with opened_archive(archive) as opened:
        content = opened.read(MANIFEST_FILE)
    try:
        manifest: dict[str, Any] = json.loads(content)
        manifest["model"]["modelName"].strip(), manifest["model"]["handler"].strip()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ScriptError(f"{MANIFEST_FILE} of {archive} names no model and handler: {error!r}") from error
    return manifest


def check_archive(archive: Path) -> None:
    """Read all of an archive, and look for the files that its manifest names.

    Raises:
        ScriptError: it is damaged or incomplete.
    """
    model = read_manifest(archive)["model"]
    with opened_archive(archive) as opened:
        damaged = opened.testzip()
        named = [model.get("serializedFile"), model.get("configFile")]
        if ".py" in model["handler"]:  # else one of TorchServe's own
            named.append(model["handler"].partition(":")[0])
        missing = {str(name) for name in named if name} - set(opened.namelist())
    if damaged or missing:
        what = f"its file {damaged} is damaged" if damaged else f"it lacks {', '.join(sorted(missing))}"
        raise ScriptError(f"cannot read the archive {archive}: {what}; scripts/build_archive.py builds one")


def batching_of(settings: Mapping[str, Any]) -> BatchingSetting:
    """The batching part of a model-config.yaml.

    Raises:
        ScriptError: a value is missing or no whole number.
    """
    for key in ("batchSize", "maxBatchDelay", "minWorkers"):
        value = settings.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ScriptError(f"{key} of {SETTINGS_FILE} is {value!r}; accepted is a whole number")
    return BatchingSetting(settings["batchSize"], settings["maxBatchDelay"], settings["minWorkers"])


def settings_to_open(archive: Path) -> dict[str, Any]:
    """The content of the model-config.yaml of an archive that another server than TorchServe is to open.

    All of the archive is checked. What only a server reads has TorchServe's default where it is left out.

    Raises:
        ScriptError: it is damaged or incomplete, was built before `OPENING_MODULE`, or has a wrong value.
    """
    check_archive(archive)
    with opened_archive(archive) as opened:
        opened.getinfo(OPENING_MODULE)
    settings = read_settings(archive)
    for key, default in SERVER_DEFAULTS.items():
        value = settings.get(key)
        settings[key] = default if value is None else value
        if not isinstance(settings[key], int) or isinstance(value, bool) or settings[key] < 1:
            raise ScriptError(f"{key} of {SETTINGS_FILE} is {value!r}; accepted is a whole number from 1 up")
    return settings


def setting_with(
    own: BatchingSetting, batch_size: int | None, delay_ms: int | None, workers: int | None
) -> BatchingSetting:
    """The setting with what is not None in place of its own."""
    changes = {"batch_size": batch_size, "delay_ms": delay_ms, "workers": workers}
    return dataclasses.replace(own, **{name: value for name, value in changes.items() if value is not None})


def copy_archive(source: Path, target: Path, replaced: Mapping[str, bytes | None]) -> Path:
    """Write a copy of an archive with members replaced, added, or left out where None; returns `target`."""
    added = dict(replaced)
    with opened_archive(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            content = added.pop(item.filename) if item.filename in added else old.read(item)
            if content is not None:
                new.writestr(item, content)
        for name, content in added.items():
            if content is not None:
                new.writestr(name, content)
    return target


def settings_with(settings: Mapping[str, Any], setting: BatchingSetting) -> dict[str, Any]:
    """The content of a model-config.yaml with this setting in place of its own."""
    serving = {**settings.get("handler", {}), **setting.serving_settings()}
    return {**settings, **setting.model_settings(), "handler": serving}


def archive_with_setting(archive: Path, folder: Path, setting: BatchingSetting) -> Path:
    """A copy of the archive in `folder` that batches as the setting says."""
    settings = settings_with(read_settings(archive), setting)
    return copy_archive(archive, folder / archive.name, {SETTINGS_FILE: _as_yaml(settings)})


def empty_archive(archive: Path, folder: Path, setting: BatchingSetting, answer_bytes: int) -> Path:
    """An archive in `folder` of the same name and model whose handler answers at once with N bytes."""
    manifest = read_manifest(archive)
    with opened_archive(archive) as source:
        names = source.namelist()
    manifest["model"].pop("serializedFile", None)
    settings = {**read_settings(archive), **setting.model_settings(), "answer_bytes": answer_bytes}
    settings.pop("handler", None)
    replaced: dict[str, bytes | None] = {
        **dict.fromkeys(names),
        MANIFEST_FILE: json.dumps(manifest).encode(),
        manifest["model"]["handler"]: EMPTY_HANDLER.read_bytes(),
        SETTINGS_FILE: _as_yaml(settings),
    }
    return copy_archive(archive, folder / archive.name, replaced)


def _as_yaml(settings: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(settings), sort_keys=False).encode()


def settings_text_with(text: str, setting: BatchingSetting) -> str:
    """The text of a model-config.yaml with this setting; comments stay, except for those in `handler:`."""
    serving = {**(yaml.safe_load(text)["handler"] or {}), **setting.serving_settings()}
    text = re.sub(r"^handler:.*\Z", "", text, flags=re.MULTILINE | re.DOTALL)
    for key, value in setting.model_settings().items():
        line = f"{key}: {value}"
        text, found = re.subn(rf"^{re.escape(key)}:.*$", line, text, flags=re.MULTILINE)
        if not found:
            text = f"{text.rstrip()}\n{line}\n"
    section = yaml.safe_dump({"handler": serving}, sort_keys=False, default_flow_style=None)
    return f"{text.rstrip()}\n{section}"
