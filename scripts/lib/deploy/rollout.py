"""Replace the served version by another one, or change its workers, without a failed request.

TorchServe ends a worker whatever it is doing. So a worker is only taken away from a version that is idle: that
is no longer the default, has no request waiting, and whose workers have each answered since then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.archive.members import read_manifest
from lib.cli import ScriptError
from lib.deploy.golden import Golden, GoldenImage, check_served, compute_golden, tolerances_of
from lib.deploy.store import ArchiveStore, Record, file_digest, free_version
from lib.deploy.worker_log import LogReader
from lib.server.management import Management, ModelVersion

POLL_S = 0.25
# A request whose version was looked up just before the switch is in the queue by then, pauses of Java included.
SETTLE_S = 1.0
# A full queue answers 503; the check must not fill it.
MAX_IN_FLIGHT = 128


@dataclass(frozen=True)
class Limits:
    """The longest waits, in seconds: for workers to get ready, for a version to get idle, for one answer.

    discard: remove a version that does not get idle; its requests are lost.
    """

    ready_s: float = 300.0
    idle_s: float = 300.0
    answer_s: float = 120.0
    discard: bool = False


class Rollout:
    """Changes of one served model; `store` has to be locked.

    predictions_url: of the model, without a version. inference_token: where the server asks for one.
    images: golden images. server_log: the server's log, for the reason why a worker does not start.
    new_classes: whether an archive may have other classes than the one served.
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
        say: Callable[[str], None] = print,
    ) -> None:
        self.management = management
        self.store = store
        self._predictions_url = predictions_url
        self._images = images
        self._server_log = server_log
        self._limits = limits
        self._inference_token = inference_token
        self._new_classes = new_classes
        self._say = say

    # --- commands ---

    def update(self, archive: Path, workers: int | None) -> None:
        """Serve another archive; workers: None keeps their number.

        Raises:
            ScriptError: it is refused; what was served before is served on.
        """
        self._require_model(archive)
        source = file_digest(archive)
        self.recover()
        served = self._served()
        record = self.store.read_record()
        workers = workers or max(1, served.wanted_workers)
        if (record.current, record.source, served.wanted_workers) == (served.version, source, workers):
            self._say(f"{archive} is already served, as version {served.version} with {workers} workers")
            return
        own = str(read_manifest(archive)["model"].get("modelVersion", "1.0"))
        version = free_version(own, {*self.management.versions(), *filter(None, [record.previous])})
        if version != own:
            self._say(f"version {own} of {archive} is taken; registering it as version {version}")
        is_startup = archive.resolve() == self.store.startup_path.resolve()
        self._replace(
            served, archive, version, workers, kept=served.version, source=source, startup=is_startup
        )

    def rollback(self) -> None:
        """Serve the archive again that was served before the last update, with as many workers as now.

        Raises:
            ScriptError: there is none, or it is refused.
        """
        self.recover()
        served, record = self._served(), self.store.read_record()
        if record.previous is None or not self.store.path(record.previous).is_file():
            raise ScriptError(f"no earlier archive of {self.store.model_name} is kept in {self.store.folder}")
        version = free_version(record.previous, self.management.versions())
        archive, workers = self.store.path(record.previous), max(1, served.wanted_workers)
        self._replace(served, archive, version, workers, kept=served.version, source=None)

    def scale(self, workers: int) -> None:
        """Serve the same archive with another number of workers.

        Raises:
            ScriptError: they do not start; the number is as before.
        """
        self.recover()
        served, record = self._served(), self.store.read_record()
        if served.has_ready(workers):
            self._say(f"version {served.version} has {workers} workers already")
            return
        if workers < served.wanted_workers:
            archive = self._keep(served)
            taken = {*self.management.versions(), *filter(None, [record.previous])}
            version = free_version(served.version, taken)
            self._replace(served, archive, version, workers, kept=record.previous, source=record.source)
            return
        self._scale_up(served, workers)

    def _scale_up(self, served: ModelVersion, workers: int) -> None:
        """Add workers to the served version, in whose files the number is noted as well."""
        archive = self._keep(served)
        follows = self.store.startup_follows(archive)
        log = LogReader(self._server_log)
        self.management.scale(served.version, workers)
        try:
            self._wait_until_ready(served.version, workers, log)
        except BaseException:
            # TorchServe ends the latest workers first: those that did not get ready.
            self.management.scale(served.version, served.wanted_workers)
            self._say(f"back to {served.wanted_workers} workers")
            raise
        self.store.add(archive, served.version, workers)
        if follows:
            self.store.set_startup(served.version)
        self._say(f"version {served.version} has {workers} workers")

    # --- one version in place of another ---

    def _replace(
        self,
        served: ModelVersion,
        archive: Path,
        version: str,
        workers: int,
        *,
        kept: str | None,
        source: str | None,
        startup: bool = False,
    ) -> None:
        """Add `archive` as `version`, make it the default, and remove the served version.

        kept: the version that a rollback serves afterwards. startup: NAME.mar is to follow in any case.

        Raises:
            ScriptError: it is refused; everything is as before.
        """
        self.management.require_registration()
        old_archive = self._keep(served)
        record = dataclasses.replace(
            self.store.read_record(),
            adding=version,
            replacing=served.version,
            kept=kept,
            added_source=source,
            startup=startup or self.store.startup_follows(old_archive),
        )
        self.store.write_record(record)
        try:
            self._add(archive, version, workers, served)
            self.management.set_default(version)
        except BaseException as error:
            self._say(f"version {version} does not take over: {_first_line(error)}")
            try:
                # Of an interrupted or unanswered switch only the server knows whether it took place.
                self.recover()
            except ScriptError as second:
                self._say(f"cannot clean up now, the next command does: {second}")
            raise
        self._say(f"version {version} is the default")
        self._finish(record)

    def _add(self, archive: Path, version: str, workers: int, served: ModelVersion) -> None:
        """Register an archive beside the served version and check it."""
        golden = compute_golden(archive, self._images)
        self._require_same_classes(golden, served.version)
        self.store.add(archive, version, workers)
        log = LogReader(self._server_log)
        self.management.register(self.store.path(version).name)
        self._say(f"version {version} registered, waiting for {workers} workers")
        added = self._wait_until_ready(version, workers, log)
        started = time.monotonic()
        sent = check_served(
            f"{self._predictions_url}/{version}",
            golden,
            tolerances_of(self.management.card(version)),
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
        assert record.adding is not None
        assert record.replacing is not None
        if record.replacing in self.management.versions():
            with self._discarding(record.replacing):
                self._wait_until_idle(record.replacing)
            self._remove(record.replacing)
        if record.startup:
            self.store.set_startup(record.adding)
        previous = record.kept
        self.store.write_record(Record(current=record.adding, source=record.added_source, previous=previous))
        self.store.remove([record.replacing, record.previous], kept=[record.adding, previous])
        self._say(f"version {record.replacing} removed; rollback serves version {previous or '(none)'}")

    def recover(self) -> None:
        """Finish or undo what an interrupted command began.

        Raises:
            ScriptError: the version to be removed does not get idle.
        """
        record = self.store.read_record()
        if record.adding is None:
            return
        if self.management.default_version() == record.adding:
            self._say(f"finishing the change from version {record.replacing} to {record.adding}")
            self._finish(record)
            return
        if record.adding in self.management.versions():
            self._remove(record.adding)
        if record.adding not in (record.replacing, record.previous):
            self.store.remove([record.adding], kept=[])
        if record.startup and record.replacing is not None and self.store.put_back_startup(record.replacing):
            self._say(
                f"{self.store.startup_path} is again what is served; the refused archive is "
                f"{self.store.refused_path}"
            )
        self.store.write_record(Record(record.current, record.source, record.previous))
        self._say(f"version {record.adding} is not there any more; version {record.replacing} serves on")

    # --- steps ---

    def _served(self) -> ModelVersion:
        return self.management.version(self.management.default_version())

    def _keep(self, served: ModelVersion) -> Path:
        return self.store.keep_served(served.version, served.archive, served.ready_pids)

    def _require_model(self, archive: Path) -> None:
        name = read_manifest(archive)["model"]["modelName"]
        if name != self.store.model_name:
            raise ScriptError(
                f"{archive} is of the model {name!r}, --model is {self.store.model_name!r}; build it with "
                f"--model-name {self.store.model_name}"
            )

    def _require_same_classes(self, golden: Golden, served: str) -> None:
        names = self.management.card(served).get("class_names")
        if names is not None and tuple(names) != golden.class_names and not self._new_classes:
            raise ScriptError(
                f"the archive's classes are {', '.join(golden.class_names)}, those of the served version "
                f"{', '.join(map(str, names))}; --new-classes accepts that clients get others"
            )

    def _wait_until_ready(self, version: str, workers: int, log: LogReader) -> ModelVersion:
        """The version, once all its workers are ready.

        Raises:
            ScriptError: a worker died or time ran out; with the reason, where the log has it.
        """
        deadline = time.monotonic() + self._limits.ready_s
        pids: dict[str, int] = {}
        while True:
            found = self.management.version(version)
            if found.has_ready(workers):
                return found
            reason = log.failure(self.store.model_name, version)
            # A worker that dies is started again, as another process.
            again = any(pids.get(each.id, -1) not in (-1, each.pid) for each in found.workers)
            pids.update((each.id, each.pid) for each in found.workers)
            if reason or again or time.monotonic() > deadline:
                what = "died" if reason or again else f"were not ready within {self._limits.ready_s:g} s"
                states = ", ".join(each.status for each in found.workers) or "none"
                raise ScriptError(
                    f"workers of version {version} {what} (wanted {workers}, there: {states})\n"
                    f"{reason or f'{log.path} does not say why; --server-log names the log of the server'}"
                )
            time.sleep(POLL_S)

    def _wait_until_idle(self, version: str) -> None:
        """Return once a version that is not the default has nothing to do.

        Every worker has answered a question put into the queue after the switch, so it has nothing from before.

        Raises:
            ScriptError: it does not get idle, or clients name the version in their requests.
        """
        deadline = time.monotonic() + self._limits.idle_s
        while True:
            pinned = self.management.pinned_requests(version)
            time.sleep(SETTLE_S)
            idle = self._has_nothing_to_do(version, deadline)
            named = self.management.pinned_requests(version) > pinned
            if idle and not named:
                return
            if time.monotonic() > deadline:
                reason = (
                    f"clients still send to {self._predictions_url}/{version}"
                    if named
                    else "requests are still waiting for a worker"
                )
                raise ScriptError(
                    f"version {version} is not idle after {self._limits.idle_s:g} s: {reason}. It stays "
                    "registered; the next command tries again, with --discard in any case"
                )

    def _has_nothing_to_do(self, version: str, deadline: float) -> bool:
        """Whether the queue is empty and every worker has answered; may wait for a batch."""
        waiting_for = set(self.management.version(version).ready_pids)
        quiet_since = time.monotonic()
        batch_s = self.management.version(version).batch_timeout_s
        while waiting_for:
            card = self.management.card(version, timeout_s=max(1.0, deadline - time.monotonic()))
            if "worker_pid" not in card:
                # An archive from before the pid was in the card: the server ends a batch after this time.
                if time.monotonic() > quiet_since + batch_s:
                    break
                time.sleep(SETTLE_S)
            elif card["worker_pid"] in waiting_for:
                waiting_for.remove(card["worker_pid"])
            else:
                time.sleep(0.01)
                waiting_for &= set(self.management.version(version).ready_pids)
            if time.monotonic() > deadline:
                return False
        return self.management.version(version).pending == 0

    @contextlib.contextmanager
    def _discarding(self, version: str) -> Iterator[None]:
        """With `discard`, go on although a version does not get idle."""
        try:
            yield
        except ScriptError as error:
            if not self._limits.discard:
                raise
            self._say(f"{error}\nremoving version {version} nevertheless (--discard)")

    def _remove(self, version: str) -> None:
        """End the workers of an idle version and unregister it."""
        self.management.scale(version, 0)
        deadline = time.monotonic() + self._limits.ready_s
        while self.management.version(version).workers:
            if time.monotonic() > deadline:
                raise ScriptError(f"the workers of version {version} do not end")
            time.sleep(POLL_S)
        self.management.unregister(version)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
