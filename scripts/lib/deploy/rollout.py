"""Replace the served version by another one, or change its workers, without a failed request."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from lib.archive.members import read_manifest, read_settings
from lib.cli import ScriptError
from lib.deploy.golden import Golden, GoldenImage, check_served, compute_golden, tolerances_of
from lib.deploy.store import ArchiveStore, Record, free_version
from lib.deploy.waiting import Limits, VersionWaiter
from lib.server.management import Management, ModelVersion

from damoyolo.checksums import file_sha256

# A full queue answers 503; the check must not fill it.
MAX_IN_FLIGHT = 128


class Rollout:
    """Changes of one served model; `store` has to be locked.

    predictions_url: of the model, without a version. inference_token: where the server asks for one.
    images: golden images. server_log: the server's log, for the reason why a worker does not start.
    new_classes: whether an archive may have other classes than the one served.
    discard: whether a version is removed that does not get idle; its requests are lost.
    say: takes what is being done, a line at a time.
    """

    def __init__(
        self,
        management: Management,
        store: ArchiveStore,
        predictions_url: str,
        images: list[GoldenImage],
        server_log: Path,
        limits: Limits,
        *,
        inference_token: str | None = None,
        new_classes: bool = False,
        discard: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self._management = management
        self._store = store
        self._predictions_url = predictions_url
        self._images = images
        self._limits = limits
        self._waiter = VersionWaiter(management, server_log, limits)
        self._inference_token = inference_token
        self._new_classes = new_classes
        self._discard = discard
        self._say = say

    def update(self, archive: Path, workers: int | None) -> None:
        """Serve another archive; workers: None keeps their number.

        Raises:
            ScriptError: it is refused; what was served before is served on.
        """
        model = read_manifest(archive)["model"]
        if model["modelName"] != self._store.model_name:
            raise ScriptError(
                f"{archive} is of the model {model['modelName']!r}, --model is {self._store.model_name!r}; "
                f"build it with --model {self._store.model_name}"
            )
        source = file_sha256(archive)
        self._management.require_registration()
        self.recover()
        served, record = self._served(), self._store.read_record()
        workers = workers or max(1, served.wanted_workers)
        if (record.current, record.source, served.wanted_workers) == (served.version, source, workers):
            self._say(f"{archive} is already served, as version {served.version} with {workers} workers")
            return
        own = str(model.get("modelVersion", "1.0"))
        version = self._free_version(own, record)
        if version != own:
            self._say(f"version {own} of {archive} is taken; it becomes version {version}")
        if (own_workers := read_settings(archive).get("minWorkers")) != workers:
            self._say(f"{archive} is for {own_workers} workers and gets {workers}; --workers changes that")
        added = dataclasses.replace(
            record,
            adding=version,
            kept=served.version,
            added_source=source,
            startup=archive.resolve() == self._store.startup_path.resolve(),
        )
        self._replace(served, archive, workers, added)

    def rollback(self) -> None:
        """Serve the archive again that was served before the last update, with as many workers as now.

        Raises:
            ScriptError: there is none, or it is refused.
        """
        self._management.require_registration()
        self.recover()
        served, record = self._served(), self._store.read_record()
        if record.previous is None or not self._store.path(record.previous).is_file():
            raise ScriptError(f"{self._store.folder} keeps no earlier archive of {self._store.model_name}")
        version = free_version(record.previous, self._management.versions())
        added = dataclasses.replace(record, adding=version, kept=served.version)
        self._replace(served, self._store.path(record.previous), max(1, served.wanted_workers), added)

    def scale(self, workers: int) -> None:
        """Serve the same archive with another number of workers, in a version of its own.

        TorchServe's own scaling would end workers whatever they are doing, also those of a number that could
        not be reached, and new workers would share the cores by the number in the unpacked archive.

        Raises:
            ScriptError: they do not start; the number is as before.
        """
        self.recover()
        served, record = self._served(), self._store.read_record()
        if served.has_ready(workers):
            self._say(f"version {served.version} has {workers} workers already")
            return
        self._management.require_registration()
        version = self._free_version(served.version, record)
        added = dataclasses.replace(record, adding=version, kept=record.previous, added_source=record.source)
        self._replace(served, self._keep(served), workers, added)

    def _replace(self, served: ModelVersion, archive: Path, workers: int, record: Record) -> None:
        """Add an archive, make it the default, and remove the served version.

        record: what to note; without `replacing`. With its `startup`, NAME.mar follows in any case.

        Raises:
            ScriptError: it is refused; everything is as before.
        """
        follows = self._startup_follows(served) or record.startup
        record = dataclasses.replace(record, replacing=served.version, startup=follows)
        version = str(record.adding)
        self._store.write_record(record)
        try:
            self._add(archive, version, workers, served)
            self._management.set_default(version)
        except BaseException:
            self._say(f"version {version} does not take over")
            try:
                # Whether an interrupted switch took place, only the server knows.
                self.recover()
            except ScriptError as error:
                self._say(f"cannot clean up now, the next command does: {error}")
            raise
        self._say(f"version {version} is the default")
        self._finish(record)

    def _add(self, archive: Path, version: str, workers: int, served: ModelVersion) -> None:
        """Register an archive beside the served version and check it.

        Raises:
            ScriptError, DamoYoloError: it is refused.
        """
        golden = compute_golden(archive, self._images)
        self._require_same_classes(golden, served.version)
        registered = self._store.add(archive, version, workers)
        self._management.register(registered.name)
        self._say(f"version {version} registered, waiting for {workers} workers")
        added = self._waiter.wait_until_ready(version, workers)
        started = time.monotonic()
        sent = check_served(
            f"{self._predictions_url}/{version}",
            golden,
            tolerances_of(self._management.card(version)),
            min(MAX_IN_FLIGHT, workers * added.batch_size),
            self._inference_token,
            self._limits.answer_s,
        )
        self._say(f"{sent} golden requests answered as expected in {time.monotonic() - started:.1f} s")

    def _finish(self, record: Record) -> None:
        """Remove the version that is no longer the default, and bring the files in line.

        Raises:
            ScriptError: it does not get idle; the next command tries again.
        """
        replaced, version = str(record.replacing), str(record.adding)
        if replaced in self._management.versions():
            self._wait_until_idle(replaced)
            self._waiter.remove(replaced)
        if record.startup and self._store.path(version).is_file():
            self._store.set_startup(version)
        else:
            self._say(f"{self._store.startup_path} is not what was served, and is left as it is")
        self._store.write_record(Record(version, record.added_source, record.kept))
        self._store.remove({replaced, record.previous} - {version, record.kept})
        self._say(f"version {replaced} is removed")

    def recover(self) -> None:
        """Finish or undo what an interrupted command began.

        Raises:
            ScriptError: the version to be removed does not get idle.
        """
        record = self._store.read_record()
        if record.adding is None:
            return
        if self._management.default_version() == record.adding:
            self._say(f"finishing the change from version {record.replacing} to {record.adding}")
            self._finish(record)
            return
        if record.adding in self._management.versions():
            self._waiter.remove(record.adding)
        if record.startup and record.replacing and self._store.put_back_startup(record.replacing):
            self._say(
                f"{self._store.startup_path} is again what is served; the refused archive is now "
                f"{self._store.refused_path}"
            )
        self._store.write_record(Record(record.current, record.source, record.previous))
        self._store.remove({record.adding} - {record.replacing, record.previous})
        self._say(f"version {record.adding} is removed; version {record.replacing} serves on")

    def _served(self) -> ModelVersion:
        return self._management.version(self._management.default_version())

    def _keep(self, served: ModelVersion) -> Path:
        return self._store.keep_served(served.version, served.archive, [w.pid for w in served.workers])

    def _startup_follows(self, served: ModelVersion) -> bool:
        """Whether NAME.mar is what is served, which is kept for a rollback.

        Raises:
            ScriptError: it cannot be kept.
        """
        try:
            return self._store.startup_follows(self._keep(served))
        except ScriptError:
            if served.ready_pids:
                raise
            self._say(f"version {served.version} has no ready worker; its archive is not kept")
            return served.archive == self._store.startup_path.name

    def _free_version(self, wanted: str, record: Record) -> str:
        """A version number that is neither registered nor kept for a rollback."""
        return free_version(wanted, {*self._management.versions(), record.previous})

    def _wait_until_idle(self, version: str) -> None:
        try:
            self._waiter.wait_until_idle(version)
        except ScriptError as error:
            if not self._discard:
                raise
            self._say(f"{error}\nremoving version {version} nevertheless (--discard)")

    def _require_same_classes(self, golden: Golden, served: str) -> None:
        names = self._management.card(served).get("class_names")
        if names is not None and tuple(names) != golden.class_names and not self._new_classes:
            raise ScriptError(
                f"the archive's classes are {', '.join(golden.class_names)}, those of the served version "
                f"{', '.join(map(str, names))}; --new-classes accepts that clients get others"
            )
