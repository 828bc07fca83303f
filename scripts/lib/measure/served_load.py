"""Measure a served model under closed and open loops, beside the two limits that it can come close to."""

from __future__ import annotations

import multiprocessing
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.archive.members import BatchingSetting
from lib.load.generator import default_processes, generate_load
from lib.load.worker import Load
from lib.server.metrics import CounterWindow, UtilisationSampler
from lib.server.served_archive import ServedModel

Row = dict[str, Any]
GENERATOR_BUSY_SHARE = 0.9  # above, the figures are those of the generator
FEWEST_OPEN_CONNECTIONS = 64  # enough that the server, not their number, limits an open loop


@dataclass(frozen=True)
class LoadPlan:
    """The loads to put on a server: `base` with each concurrency, then each rate, then each share.

    rate_shares: of the highest rate that a closed loop reached.
    gpus: over which the use of the GPUs is averaged, from the first on.
    """

    base: Load
    concurrencies: Sequence[int]
    rates_per_s: Sequence[float] = ()
    rate_shares: Sequence[float] = ()
    gpus: int = 1

    def for_gpus(self, gpus: int) -> LoadPlan:
        """The plan of one GPU for several: every load that many times, from that many times the processes."""
        processes = gpus * (self.base.processes or default_processes())
        return replace(
            self,
            base=replace(self.base, processes=processes),
            concurrencies=[gpus * concurrency for concurrency in self.concurrencies],
            rates_per_s=[gpus * rate for rate in self.rates_per_s],
            gpus=gpus,
        )


def measure_load(served: ServedModel, load: Load, name: str, gpus: int = 1) -> Row:
    """The result of one load, with the server's counters and the use of CPU and GPU meanwhile."""
    with (
        CounterWindow(served.metrics_url, served.model_name) as counters,
        UtilisationSampler(gpus) as utilisation,
    ):
        result = generate_load(load)
    return {
        "load": name,
        "connections": load.connections,
        "rate_per_s": load.rate_per_s,
        **result.row(),
        "mean_batch_size": counters.mean_batch_size,
        "stage_ms": counters.stage_ms,
        "gpu_percent": utilisation.gpu_percent(result.window_s),
        "busy_cores": utilisation.busy_cores(result.window_s),
    }


def measure_plan(
    served: ServedModel, plan: LoadPlan, report: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """One row per load of the plan; `report` gets each as it is measured."""
    base = replace(plan.base, url=served.predictions_url)
    rows: list[Row] = []

    def measure(load: Load, name: str) -> None:
        rows.append(measure_load(served, load, name, plan.gpus))
        report(rows[-1])

    for concurrency in plan.concurrencies:
        measure(replace(base, connections=concurrency, rate_per_s=None), f"closed {concurrency}")
    best = best_rate(rows)
    rates = [(rate, f"open {rate:g}/s") for rate in plan.rates_per_s]
    rates += [
        (share * best, f"open {share:.0%} = {share * best:.0f}/s") for share in plan.rate_shares if best
    ]
    connections = max(base.connections, *plan.concurrencies, FEWEST_OPEN_CONNECTIONS)
    for rate_per_s, name in rates:
        measure(replace(base, connections=connections, rate_per_s=rate_per_s), name)
    return rows


def best_rate(rows: Sequence[Row]) -> float:
    """The highest rate of the closed loops without an error; 0 where there is none."""
    return max(
        (row["requests_per_s"] for row in rows if row["rate_per_s"] is None and not row["errors"]),
        default=0.0,
    )


def network_rate(archive: Path, images: Sequence[bytes], batch_size: int, device: str | None) -> float:
    """Images/s of the bare network, measured in a process of its own, whose memory is then free.

    device: None is CUDA where there is one.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_network_rate, archive, images, batch_size, device).result()


def _network_rate(archive: Path, images: Sequence[bytes], batch_size: int, device: str | None) -> float:
    import torch

    from lib.archive.reader import load_detector
    from lib.measure.calls import batch_seconds

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = BatchingSetting(batch_size, 1, 1).serving_settings()
    detector = load_detector(archive, torch.device(device), **sizes)
    try:
        return batch_size / batch_seconds(detector, images, batch_size)[0]
    finally:
        detector.close()


def add_network_limit(row: Row, network_per_s: float | None) -> None:
    """Add the rate of the bare network on as many GPUs, and the row's ratio to it.

    network_per_s: on one GPU.
    """
    limit = network_per_s * (row["gpus"] or 1) if network_per_s else None
    row["network_per_s"] = limit
    row["of_network"] = row["requests_per_s"] / limit if limit else None


def add_empty_limit(rows: Sequence[Row], empty_rows: Sequence[Row]) -> None:
    """Add to each row its ratio to the empty handler with as many GPUs at the same concurrency.

    empty_rows: closed loops; those with errors are no limit.
    """
    limits = {
        (row["gpus"], row["connections"]): row["requests_per_s"] for row in empty_rows if not row["errors"]
    }
    for row in rows:
        limit = limits.get((row["gpus"], row["connections"])) if row["rate_per_s"] is None else None
        row["empty_per_s"] = limit
        row["of_empty"] = row["requests_per_s"] / limit if limit else None


def add_scaling(rows: Sequence[Row]) -> None:
    """Add to each closed loop its rate over the mean of one GPU with the same load per GPU."""
    of_one = defaultdict(list)
    for row in rows:
        if row["gpus"] == 1 and row["rate_per_s"] is None:
            of_one[row["connections"]].append(row["requests_per_s"])
    for row in rows:
        rates = of_one.get(row["connections"] // row["gpus"]) if row["rate_per_s"] is None else None
        row["of_one_gpu"] = row["requests_per_s"] / statistics.fmean(rates) if rates else None


def warnings_about(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table has to know."""
    warnings = [
        f"{row['load']}: the load generator was busy for {row['generator_busy_share']:.0%} of the time and "
        "may have been the limit; give it more --processes"
        for row in rows
        if (row["generator_busy_share"] or 0.0) > GENERATOR_BUSY_SHARE
    ]
    warnings += [
        f"{row['load']}: statuses {row['statuses']}, connection errors {row['connection_errors']}, "
        f"timeouts {row['timeouts']}, dropped {row['dropped']}"
        for row in rows
        if row["errors"]
    ]
    warnings += [
        f"{row['load']}: {row['gpus']} GPUs, and workers on each: {row['workers_per_gpu']}"
        for row in rows
        if _is_uneven(row)
    ]
    return warnings


def _is_uneven(row: Row) -> bool:
    """Whether the workers are known not to be spread evenly over the GPUs that were requested."""
    workers = row.get("workers_per_gpu")
    if not row.get("gpus") or not workers:
        return False
    return len(workers) != row["gpus"] or len(set(workers.values())) > 1
