"""Search for the batching setting of highest rate within a latency budget, in fewer trials than a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lib.archive.members import BatchingSetting

# Repetitions differ by this much: a larger batch or one more worker has to gain more than that.
NOISE = 0.02


@dataclass(frozen=True)
class Measurement:
    """The highest rate found for a setting, and the latencies at it."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int = 0
    concurrency: int = 0

    def meets(self, budget_ms: float) -> bool:
        """Whether it is without errors and within the bound on p99."""
        return not self.errors and self.p99_ms <= budget_ms

    def __str__(self) -> str:
        return (
            f"{self.requests_per_s:.1f}/s, p50 {self.p50_ms:.1f} ms, p99 {self.p99_ms:.1f} ms, "
            f"{self.errors} errors at concurrency {self.concurrency}"
        )


Measure = Callable[[BatchingSetting], Measurement]


@dataclass
class SearchResult:
    """Every setting that was tried, in order, and the best of them."""

    trials: dict[BatchingSetting, Measurement] = field(default_factory=dict)
    best: BatchingSetting | None = None  # None while nothing was measured

    def best_measurement(self) -> Measurement:
        """The measurement of the best setting."""
        assert self.best is not None
        return self.trials[self.best]


@dataclass(frozen=True)
class SearchSpace:
    """The values to choose from, each ascending."""

    batch_sizes: Sequence[int]
    delays_ms: Sequence[int]
    workers: Sequence[int]


def find_setting(measure: Measure, space: SearchSpace, budget_ms: float) -> SearchResult:
    """The setting of highest rate, among those tried, whose p99 stays within the budget.

    Coarse to fine: every third batch size with the fewest, most and a middle number of workers, at the
    shortest delay; then the neighbours of the best in batch size and workers, until none is better; then the
    delay, upwards; then the neighbours once more at that delay. Where no setting meets the budget, the
    one of lowest p99 is the best.
    """
    result = SearchResult()

    def try_setting(setting: BatchingSetting) -> None:
        if setting not in result.trials:
            result.trials[setting] = measure(setting)
            result.best = _best(result.trials, budget_ms)

    # Workers in the inner loop: their number can change without a restart of the server.
    for batch_size in _spread(space.batch_sizes, 3):
        for workers in _ends_and_middle(space.workers):
            try_setting(BatchingSetting(batch_size, space.delays_ms[0], workers))
    _climb(result, try_setting, lambda setting: _neighbours(setting, space))
    _climb(result, try_setting, lambda setting: _next_delays(setting, space))
    _climb(result, try_setting, lambda setting: _neighbours(setting, space))
    return result


def _climb(
    result: SearchResult,
    try_setting: Callable[[BatchingSetting], None],
    candidates: Callable[[BatchingSetting], Iterable[BatchingSetting]],
) -> None:
    """Try the candidates around the best setting until none of them is better."""
    centre = None
    while centre != result.best:
        centre = result.best
        assert centre is not None
        for candidate in candidates(centre):
            try_setting(candidate)


def _best(trials: Mapping[BatchingSetting, Measurement], budget_ms: float) -> BatchingSetting:
    """The cheapest of those within noise of the highest rate; else the one of lowest p99."""
    rates = {
        setting: measured.requests_per_s for setting, measured in trials.items() if measured.meets(budget_ms)
    }
    if not rates:
        return min(trials, key=lambda setting: (trials[setting].errors > 0, trials[setting].p99_ms))
    enough = (1 - NOISE) * max(rates.values())
    return min((setting for setting, rate in rates.items() if rate >= enough), key=_cost)


def _cost(setting: BatchingSetting) -> tuple[int, int, int]:
    """The order among equal rates: memory of workers first, then of batches, then waiting."""
    return setting.workers, setting.batch_size, setting.delay_ms


def _neighbours(setting: BatchingSetting, space: SearchSpace) -> list[BatchingSetting]:
    """One step in workers, in batch size, or in both in opposite directions: their product bounds p99."""
    workers, sizes = _beside(space.workers, setting.workers), _beside(space.batch_sizes, setting.batch_size)
    return [
        *(replace(setting, workers=count) for count in workers),
        *(replace(setting, batch_size=size) for size in sizes),
        *(
            replace(setting, batch_size=size, workers=count)
            for size in sizes
            for count in workers
            if (size > setting.batch_size) != (count > setting.workers)
        ),
    ]


def _next_delays(setting: BatchingSetting, space: SearchSpace) -> list[BatchingSetting]:
    """One step in the delay, alone or with one in workers, as others compute while one waits."""
    return [
        replace(setting, delay_ms=delay_ms, workers=workers)
        for delay_ms in _beside(space.delays_ms, setting.delay_ms)
        for workers in (setting.workers, *_beside(space.workers, setting.workers))
    ]


def _beside(values: Sequence[int], value: int) -> list[int]:
    index = list(values).index(value)
    return [values[near] for near in (index - 1, index + 1) if 0 <= near < len(values)]


def _spread(values: Sequence[int], step: int) -> list[int]:
    """Every `step`-th value, and the last."""
    chosen = list(values[step // 2 :: step]) or list(values[:1])
    return chosen if chosen[-1] == values[-1] else [*chosen, values[-1]]


def _ends_and_middle(values: Sequence[int]) -> list[int]:
    return sorted({values[0], values[len(values) // 2], values[-1]})
