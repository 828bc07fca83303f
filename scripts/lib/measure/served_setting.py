"""Measure batching settings with a TorchServe: the highest rate of closed loops within a latency budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch

from lib.archive.members import BatchingSetting
from lib.cli import ScriptError
from lib.load.generator import generate_load
from lib.load.worker import Load
from lib.measure.batching_search import Measurement
from lib.server.served_archive import ServedModel, serve_with_setting

from damoyolo.cores import usable_cores

# Concurrency of a setting's closed loops, in multiples of the images that its workers process at once. Two
# (one batch computed, one waiting) keep all busy; where that is too slow for the budget, fewer may do.
ROUNDS_IN_FLIGHT = (2.0, 1.0, 0.5)


class SettingMeasurer:
    """Measures settings, each with a TorchServe of its own; stops the last one on leaving.

    On GPUs another number of workers is scaled without a restart, where that gives what a restart would. A
    multiple of the number of GPUs stays evenly spread: TorchServe adds in turn and removes the last.
    On a CPU it is not: a worker takes its share of the cores when it loads.

    environment: variables for the servers.
    """

    def __init__(
        self,
        archive: Path,
        load: Load,
        budget_ms: float,
        report: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._archive = archive
        self._load = load
        self._budget_ms = budget_ms
        self._report = report
        self._environment = environment
        self._stack = contextlib.ExitStack()
        self._served: tuple[BatchingSetting, ServedModel] | None = None

    def __enter__(self) -> SettingMeasurer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, setting: BatchingSetting) -> Measurement:
        """The highest rate of the closed loops within the budget; else the one of lowest p99."""
        try:
            served = self._serve(setting)
        except ScriptError as error:
            # Too many workers or too large a batch for the memory; the others can still be tried.
            self._stop()
            self._report(f"{setting}: does not start ({str(error).splitlines()[-1]})")
            return Measurement(0.0, float("inf"), float("inf"), errors=1)
        best: Measurement | None = None
        for rounds in ROUNDS_IN_FLIGHT:
            measured = self._measure(served, max(1, round(rounds * setting.batch_size * setting.workers)))
            if best is None or measured.meets(self._budget_ms) or measured.p99_ms < best.p99_ms:
                best = measured
            if measured.meets(self._budget_ms):
                break
        assert best is not None
        self._report(f"{setting}: {best}" + ("" if best.meets(self._budget_ms) else " (over the budget)"))
        return best

    def _measure(self, served: ServedModel, connections: int) -> Measurement:
        result = generate_load(replace(self._load, url=served.predictions_url, connections=connections))
        latencies = result.percentiles_ms
        return Measurement(
            result.requests_per_s, latencies["p50"], latencies["p99"], result.errors, connections
        )

    def _serve(self, setting: BatchingSetting) -> ServedModel:
        if self._served is not None:
            current, served = self._served
            if current == setting:
                return served
            if torch.cuda.is_available() and scales_into(current, setting):
                served.scale(setting.workers)
                self._served = (setting, served)
                return served
        self._stop()
        served = self._stack.enter_context(serve_with_setting(self._archive, setting, self._environment))
        self._served = (setting, served)
        return served

    def _stop(self) -> None:
        self._served = None
        self._stack.close()


def scales_into(current: BatchingSetting, setting: BatchingSetting) -> bool:
    """Whether scaling the workers of a running server gives what a start with the setting would.

    The length of the queue and, by `cuda_sync`, how a worker waits are fixed at the start.
    """
    cores = usable_cores()
    return (
        replace(current, workers=setting.workers) == setting
        and current.model_settings()["jobQueueSize"] == setting.model_settings()["jobQueueSize"]
        and (2 * current.workers > cores) == (2 * setting.workers > cores)
    )
