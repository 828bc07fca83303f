"""The search for settings on a model of a server, and the sweep over batch sizes that runs out of memory."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lib.archive.members import (
    BatchingSetting,
    archive_with_setting,
    batching_of,
    empty_archive,
    read_settings,
    settings_text_with,
)
from lib.measure.batching_search import Measurement, SearchResult, SearchSpace, find_setting

import tune
from damoyolo.config import ServingConfig
from tune import BatchTime, recommended_batch_size, sweep_batch_sizes

SPACE = SearchSpace((1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 5, 10, 20), (1, 2, 3, 4, 5, 6))
GRID = len(SPACE.batch_sizes) * len(SPACE.delays_ms) * len(SPACE.workers)


def modelled(setting: BatchingSetting, fixed_ms: float = 4.0, image_ms: float = 0.16) -> Measurement:
    """A device that all workers share, host work that they overlap with it, and memory for five workers."""
    if setting.workers > 5:
        return Measurement(0.0, float("inf"), float("inf"), errors=1)
    device_ms = fixed_ms + image_ms * setting.batch_size
    host_ms = 2.0 + 0.25 * setting.batch_size
    # Batches leave a little less than full when the wait is too short for them.
    fill = min(1.0, 0.9 + 0.02 * setting.delay_ms)
    round_ms = max(device_ms, (device_ms + host_ms + 0.3 * setting.delay_ms) / setting.workers)
    rate = fill * setting.batch_size / round_ms * 1e3
    in_flight = 2 * setting.batch_size * setting.workers
    p50_ms = in_flight / rate * 1e3
    return Measurement(rate, p50_ms, 1.3 * p50_ms, concurrency=in_flight)


def modelled_within(budget_ms: float) -> Callable[[BatchingSetting], Measurement]:
    """The same with half of that in flight, at somewhat less, where the budget asks for it."""

    def measure(setting: BatchingSetting) -> Measurement:
        full = modelled(setting)
        if full.errors or full.meets(budget_ms):
            return full
        rate, p50_ms = 0.95 * full.requests_per_s, full.p50_ms / 2 / 0.95
        return Measurement(rate, p50_ms, 1.3 * p50_ms, concurrency=full.concurrency // 2)

    return measure


def best_of_grid(budget_ms: float) -> float:
    """The highest rate within the budget, by trying everything."""
    measured = [
        modelled_within(budget_ms)(BatchingSetting(batch_size, delay_ms, workers))
        for batch_size in SPACE.batch_sizes
        for delay_ms in SPACE.delays_ms
        for workers in SPACE.workers
    ]
    return max(each.requests_per_s for each in measured if each.meets(budget_ms))


@pytest.mark.parametrize("budget_ms", [25.0, 40.0, 60.0, 100.0, 200.0, 1000.0])
def test_the_search_finds_nearly_the_best_of_the_grid_in_a_fraction_of_its_trials(budget_ms: float) -> None:
    result = find_setting(modelled_within(budget_ms), SPACE, budget_ms)
    found = result.best_measurement()
    assert found.meets(budget_ms)
    # Where the bound cuts between neighbours it may take two steps at once to the better side of it.
    assert found.requests_per_s >= 0.8 * best_of_grid(budget_ms)
    if budget_ms >= 200:
        assert found.requests_per_s >= 0.98 * best_of_grid(budget_ms)
    assert len(result.trials) <= GRID / 6


def test_no_setting_is_measured_twice() -> None:
    asked: list[BatchingSetting] = []

    def measure(setting: BatchingSetting) -> Measurement:
        asked.append(setting)
        return modelled(setting)

    result = find_setting(measure, SPACE, 100.0)
    assert len(asked) == len(set(asked)) == len(result.trials)


def test_of_equal_rates_the_fewest_workers_and_the_smallest_batch_win() -> None:
    def measure(setting: BatchingSetting) -> Measurement:
        return Measurement(1000.0 + setting.workers + setting.batch_size / 100, 5.0, 10.0)

    result = find_setting(measure, SPACE, 100.0)
    assert result.best == BatchingSetting(1, 1, 1)


def test_where_nothing_meets_the_budget_the_quickest_without_errors_is_named() -> None:
    result = find_setting(modelled, SPACE, 0.1)
    assert not result.best_measurement().meets(0.1)
    assert result.best_measurement().p99_ms == min(each.p99_ms for each in result.trials.values())


def test_a_setting_with_errors_is_never_chosen_over_one_without() -> None:
    def measure(setting: BatchingSetting) -> Measurement:
        return Measurement(100.0 * setting.workers, 5.0, 10.0, errors=setting.workers > 2)

    result = find_setting(measure, SPACE, 100.0)
    assert result.best is not None
    assert result.best.workers == 2


def test_a_space_of_one_setting_is_measured_once() -> None:
    result = find_setting(modelled, SearchSpace((8,), (2,), (1,)), 1000.0)
    assert list(result.trials) == [BatchingSetting(8, 2, 1)]


def batch_time(batch_size: int) -> BatchTime:
    """4 ms and 0.2 ms an image."""
    seconds = (4.0 + 0.2 * batch_size) / 1e3
    return BatchTime(batch_size, seconds, seconds, None)


def fitting(largest: int) -> Callable[[int], BatchTime]:
    """Batches up to this one fit into the memory."""

    def measure(batch_size: int) -> BatchTime:
        if batch_size > largest:
            raise torch.OutOfMemoryError("out of memory")
        return batch_time(batch_size)

    return measure


def sweep(largest: int, batch_sizes: list[int]) -> tuple[list[int], list[str], int]:
    """The sizes that were measured, what was said, and how often memory was freed."""
    said: list[str] = []
    freed: list[None] = []
    times = sweep_batch_sizes(fitting(largest), batch_sizes, lambda: freed.append(None), said.append)
    return [time.batch_size for time in times], said, len(freed)


def test_a_sweep_within_the_memory_measures_every_size_in_order() -> None:
    assert sweep(64, [8, 1, 64, 8]) == ([1, 8, 64], [], 0)


def test_out_of_memory_ends_the_sweep_at_the_largest_power_that_fits() -> None:
    measured, said, freed = sweep(40, [1, 2, 4, 8, 16, 32, 64, 128])
    assert measured == [1, 2, 4, 8, 16, 32]
    assert freed == 1
    assert "batch 64 does not fit" in said[0]


def test_out_of_memory_halves_until_a_batch_fits_and_goes_on() -> None:
    measured, said, freed = sweep(30, [4, 200])
    assert measured == [4, 25]
    assert freed == 3
    assert [message.rpartition(" ")[2] for message in said] == ["100", "50", "25"]


def test_not_even_one_image_fitting_leaves_nothing() -> None:
    assert sweep(0, [4])[0] == []


def test_the_smallest_batch_near_the_best_rate_is_recommended() -> None:
    times = [batch_time(2**power) for power in range(11)]
    chosen = recommended_batch_size(times)
    best = max(time.images_per_s for time in times)
    assert batch_time(chosen).images_per_s >= 0.95 * best > batch_time(chosen // 2).images_per_s


def test_the_recommended_file_is_the_projects_with_the_settings_in_place(project_dir: Path) -> None:
    text = (project_dir / "handler" / "model-config.yaml").read_text()
    setting = BatchingSetting(48, 5, 3)
    written = settings_text_with(text, setting)
    before, after = yaml.safe_load(text), yaml.safe_load(written)
    assert batching_of(after) == setting
    assert after["jobQueueSize"] == 4 * 48 * 3
    assert after["handler"]["graph_batch_sizes"] == [1, 2, 4, 8, 12, 16, 20, 24, 32, 48]
    assert after["responseTimeout"] == before["responseTimeout"]
    assert "# Requests that wait when every worker is busy" in written
    ServingConfig.from_mapping(after["handler"])
    assert settings_text_with(written, setting) == written


def write_archive(path: Path) -> Path:
    """The parts of an archive that its variants depend on."""
    manifest = {
        "model": {
            "modelName": "m",
            "handler": "h.py",
            "serializedFile": "w.pth",
            "configFile": "model-config.yaml",
        }
    }
    settings = {
        "batchSize": 8,
        "maxBatchDelay": 2,
        "minWorkers": 1,
        "maxWorkers": 1,
        "handler": {"variant": "T"},
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("model-config.yaml", yaml.safe_dump(settings))
        archive.writestr("h.py", "class Handler: ...")
        archive.writestr("w.pth", bytes(1000))
    return path


def test_an_archive_with_another_setting_differs_in_that_alone(tmp_path: Path) -> None:
    source = write_archive(tmp_path / "m.mar")
    (tmp_path / "copy").mkdir()
    setting = BatchingSetting(3, 7, 2)
    copy = archive_with_setting(source, tmp_path / "copy", setting)
    assert batching_of(read_settings(copy)) == setting
    assert read_settings(copy)["handler"] == {"variant": "T", "graph_batch_sizes": [1, 2, 3]}
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(copy) as after:
        assert sorted(before.namelist()) == sorted(after.namelist())
        assert before.read("w.pth") == after.read("w.pth")


def test_the_empty_archive_serves_the_same_name_with_a_handler_that_does_nothing(tmp_path: Path) -> None:
    source = write_archive(tmp_path / "m.mar")
    (tmp_path / "copy").mkdir()
    copy = empty_archive(source, tmp_path / "copy", BatchingSetting(3, 7, 2), answer_bytes=123)
    assert read_settings(copy)["answer_bytes"] == 123
    with zipfile.ZipFile(copy) as archive:
        assert "w.pth" not in archive.namelist()
        namespace: dict[str, type] = {"__name__": "h"}
        exec(archive.read("h.py"), namespace)

    class Context:
        """What the server gives a handler."""

        model_yaml_config = read_settings(copy)

    handler = namespace["EmptyHandler"]()
    handler.initialize(Context())
    assert [len(answer) for answer in handler.handle([{}, {}], Context())] == [123, 123]


def test_the_tool_writes_the_recommendation_and_its_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def search(_arguments: object, _images: object, space: SearchSpace) -> SearchResult:
        return find_setting(modelled, space, 100.0)

    monkeypatch.setattr(tune, "_search", search)
    monkeypatch.setattr(tune, "measure_batch", lambda archive, images, device, size: batch_time(size))
    written, plot, rows = tmp_path / "new" / "model-config.yaml", tmp_path / "p.png", tmp_path / "rows.json"
    command = ["--p99-ms", "100", "--write", str(written), "--plot", str(plot), "--json", str(rows)]
    assert tune.main(command) == 0
    chosen = [row for row in map(json.loads, rows.read_text().splitlines()) if row.get("chosen")]
    assert len(chosen) == 1
    assert yaml.safe_load(written.read_text())["batchSize"] == chosen[0]["batch_size"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "recommended: batch" in capsys.readouterr().out
