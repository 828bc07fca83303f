"""The archives of a served model in the model store, and the record of what was deployed."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lib.archive.members import (
    copy_archive,
    opened_archive,
    queue_size,
    read_manifest,
    read_settings,
)
from lib.cli import ScriptError

from damoyolo.config import MANIFEST_FILE, SETTINGS_FILE

# Names that TorchServe, the front end and a shell take as they are.
PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}"


@dataclass(frozen=True)
class Record:
    """What a later command has to know.

    current, source: the version that was deployed last, and the SHA-256 of the archive that was given for it.
    previous: the version that a rollback serves again.
    adding: the version being added; None between two commands. replacing: the version it takes over from.
    kept: what becomes `previous` when `adding` has taken over. added_source: its `source`.
    startup: whether NAME.mar, which the server loads when it starts, follows what is served.
    """

    current: str | None = None
    source: str | None = None
    previous: str | None = None
    adding: str | None = None
    replacing: str | None = None
    kept: str | None = None
    added_source: str | None = None
    startup: bool = False


class ArchiveStore:
    """The archives of one model in the server's model store.

    NAME.mar is what the server loads when it starts, NAME_VERSION.mar what was registered as that version.
    """

    def __init__(self, folder: Path, model_name: str) -> None:
        if not re.fullmatch(PLAIN_NAME, model_name):
            raise ScriptError(
                f"--model is {model_name!r}; accepted are up to 61 letters, digits, points, - and _"
            )
        if not folder.is_dir():
            raise ScriptError(f"--model-store is {folder}, which is no folder; it takes the server's")
        self.folder = folder
        self.model_name = model_name
        self.startup_path = folder / f"{model_name}.mar"
        self.refused_path = folder / f"{model_name}.refused"
        self._record_path = folder / f".{model_name}.deploy.json"

    def path(self, version: str) -> Path:
        """The archive that is registered as this version."""
        return self.folder / f"{self.model_name}_{version}.mar"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other command change the same model meanwhile; the lock ends with its process.

        Raises:
            ScriptError: another one does.
        """
        path = self.folder / f".{self.model_name}.deploy.lock"
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise ScriptError(
                    f"another deploy.py (process {file.read() or 'unknown'}) is changing {self.model_name}; "
                    "wait until it has ended"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def read_record(self) -> Record:
        """The record; an empty one before the first command.

        Raises:
            ScriptError: it is damaged.
        """
        if not self._record_path.exists():
            return Record()
        try:
            return Record(**json.loads(self._record_path.read_text()))
        except (ValueError, TypeError) as error:
            raise ScriptError(
                f"{self._record_path} is damaged ({error}); remove it if `deploy.py status` shows one version"
            ) from error

    def write_record(self, record: Record) -> None:
        """Replace the record in one step."""
        _replace(self._record_path, json.dumps(dataclasses.asdict(record), indent=1).encode() + b"\n")

    def add(self, source: Path, version: str, workers: int) -> Path:
        """Put a copy of an archive into the store under a version number and with a number of workers.

        Raises:
            ScriptError: `source` cannot be read.
        """
        settings = read_settings(source)
        manifest = read_manifest(source)
        manifest["model"]["modelVersion"] = version
        # The server takes the number from the archive, whatever it is asked for, if both bounds are there.
        settings.update(minWorkers=workers, maxWorkers=workers)
        if isinstance(settings.get("batchSize"), int):
            needed = queue_size(settings["batchSize"], workers)
            settings["jobQueueSize"] = max(settings.get("jobQueueSize") or 0, needed)
        target = self.path(version)
        partial = target.with_name(f".{target.name}.partial")
        replaced = {
            MANIFEST_FILE: json.dumps(manifest).encode(),
            SETTINGS_FILE: yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode(),
        }
        try:
            copy_archive(source, partial, replaced)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    def keep_served(self, version: str, archive: str, pids: Iterable[int]) -> Path:
        """The archive that is served as this version, which it may have to pack from a worker's folder.

        archive: what the server loaded. pids: of the version's workers.

        A file that `add` made is not changed by anyone else; NAME.mar may have been built again since.

        Raises:
            ScriptError: the workers' folder cannot be read.
        """
        target = self.path(version)
        if archive == target.name and target.is_file():
            return target
        for pid in pids:
            folder = Path(f"/proc/{pid}/cwd")
            if _is_model(folder, self.model_name, version):
                partial = target.with_name(f".{target.name}.partial")
                _pack(folder, partial)
                partial.replace(target)
                return target
        raise ScriptError(
            f"cannot read the folder in which the workers of version {version} run, to keep their archive; "
            "run this command on the server's machine, as its user"
        )

    def startup_follows(self, served: Path) -> bool:
        """Whether NAME.mar is the archive that is served."""
        return self.startup_path.is_file() and _contents(self.startup_path) == _contents(served)

    def set_startup(self, version: str) -> None:
        """Let the server load this version when it starts."""
        partial = self.startup_path.with_name(f".{self.startup_path.name}.partial")
        shutil.copyfile(self.path(version), partial)
        partial.replace(self.startup_path)

    def put_back_startup(self, version: str) -> bool:
        """Let the server load this version when it starts; whether there was another, which is kept."""
        if not self.path(version).is_file():
            return False
        if self.startup_path.is_file():
            if self.startup_follows(self.path(version)):
                return False
            self.startup_path.replace(self.refused_path)
        self.set_startup(version)
        return True

    def remove(self, versions: Iterable[str | None]) -> None:
        """Remove the archives of versions."""
        for version in versions:
            if version is not None:
                self.path(version).unlink(missing_ok=True)


def free_version(wanted: str, taken: Collection[str | None]) -> str:
    """`wanted`, or the next version that is not taken: its last number is raised."""
    while wanted in taken:
        head, number = re.fullmatch(r"(.*?)([0-9]*)", wanted, re.DOTALL).groups()  # type: ignore[union-attr]
        wanted = f"{head}{int(number) + 1}" if number else f"{head}.1"
    return wanted


def _contents(archive: Path) -> dict[str, int]:
    """The checksum of each file in an archive."""
    with opened_archive(archive) as opened:
        return {item.filename: item.CRC for item in opened.infolist() if not item.is_dir()}


def _is_model(folder: Path, model_name: str, version: str) -> bool:
    """Whether a folder is the unpacked archive of this version, and not that of a process elsewhere."""
    try:
        model: Any = json.loads((folder / MANIFEST_FILE).read_text())["model"]
        return (model["modelName"], str(model["modelVersion"])) == (model_name, version)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _pack(folder: Path, target: Path) -> None:
    """Pack the files of an unpacked archive again, without those that Python wrote."""
    with zipfile.ZipFile(target, "w") as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                packed.write(path, path.relative_to(folder))


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
