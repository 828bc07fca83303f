"""Wait until a version is ready, idle or gone.

TorchServe ends a worker whatever it is doing. So workers are only taken away from a version that is idle: one
that is not the default, has no request waiting, and whose workers have each answered since the switch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lib.cli import ScriptError
from lib.deploy.worker_log import LogReader
from lib.server.management import Management, ModelVersion

# On a GPU host each description of a version runs nvidia-smi in a thread that serves connections.
POLL_S = 1.0
# A request whose version was looked up just before the switch is in the queue by then, even if Java paused.
SETTLE_S = 1.0


@dataclass(frozen=True)
class Limits:
    """The longest waits, in seconds: for workers to start or end, for idleness, for an answer."""

    workers_s: float = 300.0
    idle_s: float = 300.0
    answer_s: float = 120.0


class VersionWaiter:
    """Waits for versions of one model.

    server_log: the server's log, for the reason why a worker does not start.
    """

    def __init__(self, management: Management, server_log: Path, limits: Limits) -> None:
        self._management = management
        self._limits = limits
        self._log = LogReader(server_log)

    def wait_until_ready(self, version: str, workers: int) -> ModelVersion:
        """The version, once it has this number of workers and all are ready.

        Raises:
            ScriptError: a worker died or time ran out; with the reason, where the log has it.
        """
        deadline = time.monotonic() + self._limits.workers_s
        pids: dict[str, int] = {}
        while True:
            found = self._management.version(version)
            if found.has_ready(workers):
                return found
            reason = self._reason(version)
            # A worker that dies is started again, as another process.
            again = any(pids.get(each.id, -1) not in (-1, each.pid) for each in found.workers)
            pids.update((each.id, each.pid) for each in found.workers)
            if reason or again or time.monotonic() > deadline:
                what = "died" if reason or again else f"were not ready within {self._limits.workers_s:g} s"
                states = ", ".join(each.status for each in found.workers) or "none"
                unknown = f"{self._log.path} does not say why; --server-log names the log of the server"
                raise ScriptError(
                    f"workers of version {version} {what} (wanted {workers}, there: {states})\n"
                    f"{reason or unknown}"
                )
            time.sleep(POLL_S)

    def _reason(self, version: str) -> str:
        """Why a worker failed, as far as the log says; "" as long as none has."""
        reason = self._log.failure(self._management.model_name, version)
        if not reason:
            return ""
        time.sleep(1.0)  # the rest of the traceback
        return self._log.failure(self._management.model_name, version)

    def wait_until_idle(self, version: str) -> None:
        """Return once a version that is not the default has nothing to do.

        Raises:
            ScriptError: it does not get idle, or clients name the version in their requests.
        """
        deadline = time.monotonic() + self._limits.idle_s
        while True:
            pinned = self._management.pinned_requests(version)
            time.sleep(SETTLE_S)
            idle = self._all_workers_answer(version, deadline)
            named = self._management.pinned_requests(version) > pinned
            if idle and not named:
                return
            if time.monotonic() > deadline:
                reason = (
                    "clients still name it in the address of their requests"
                    if named
                    else "requests wait for its workers"
                )
                raise ScriptError(
                    f"version {version} is not idle after {self._limits.idle_s:g} s: {reason}. It stays "
                    "registered, and the next command tries again; with --discard it removes the version in "
                    "any case"
                )

    def _all_workers_answer(self, version: str, deadline: float) -> bool:
        """Whether every worker has answered a question from the queue, which is empty then.

        The question is the model card: an idle worker answers it at once, a busy one after its batch.
        """
        found = self._management.version(version)
        silent, started = set(found.ready_pids), time.monotonic()
        while silent:
            if time.monotonic() > deadline:
                return False
            card = self._management.card(version, timeout_s=max(1.0, deadline - time.monotonic()))
            pid = card.get("worker_pid")
            if pid in silent:
                silent.remove(pid)
                continue
            # Another one was faster; or the archive is older than the pid in its card, and then the time that
            # the server allows for a batch has to pass.
            time.sleep(0.01 if pid is not None else POLL_S)
            if pid is None and time.monotonic() > started + found.batch_timeout_s:
                break
            silent &= set(self._management.version(version).ready_pids)
        return self._management.version(version).pending == 0

    def remove(self, version: str) -> None:
        """End the workers of an idle version and unregister it.

        Raises:
            ScriptError: the workers do not end.
        """
        self._management.scale(version, 0)
        deadline = time.monotonic() + self._limits.workers_s
        while self._management.version(version).workers:
            if time.monotonic() > deadline:
                raise ScriptError(f"the workers of version {version} do not end")
            time.sleep(POLL_S)
        self._management.unregister(version)
