"""The sweep over batch sizes that runs out of memory."""

import sys

import pytest
import torch

from lib.measure import batch_sweep
from lib.measure.batch_sweep import BatchTime, recommended_batch_size, sweep_batch_sizes


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """Spare the time of collecting garbage, of which there is none here."""
    monkeypatch.setattr(batch_sweep, "free_device_memory", lambda: None)


def batch_time(batch_size):
    """4 ms and 0.2 ms an image."""
    seconds = (4.0 + 0.2 * batch_size) / 1e3
    return BatchTime(batch_size, seconds, seconds, None)


def fitting(largest):
    """Batches up to this one fit into the memory."""

    def measure(batch_size):
        if batch_size > largest:
            raise torch.OutOfMemoryError("out of memory")
        return batch_time(batch_size)

    return measure


def sweep(largest, batch_sizes):
    """The sizes that were measured, and the messages."""
    messages = []
    times = sweep_batch_sizes(fitting(largest), batch_sizes, messages.append)
    return [time.batch_size for time in times], messages


def test_a_sweep_within_the_memory_measures_every_size_in_order():
    assert sweep(64, [8, 1, 64, 8]) == ([1, 8, 64], [])


def test_out_of_memory_ends_the_sweep_at_the_largest_power_that_fits():
    measured, messages = sweep(40, [1, 2, 4, 8, 16, 32, 64, 128])
    assert measured == [1, 2, 4, 8, 16, 32]
    assert "batch 64 does not fit" in messages[0]


def test_out_of_memory_halves_until_a_batch_fits_and_goes_on():
    measured, messages = sweep(30, [4, 200])
    assert measured == [4, 25]
    assert [message.rpartition(" ")[2] for message in messages] == ["100", "50", "25"]


def test_memory_is_freed_after_a_failed_batch_once_its_exception_is_gone(monkeypatch):
    events = []

    def free():
        assert sys.exc_info() == (None, None, None)
        events.append("freed")

    def measure(batch_size):
        events.append(batch_size)
        return fitting(4)(batch_size)

    monkeypatch.setattr(batch_sweep, "free_device_memory", free)
    sweep_batch_sizes(measure, [8], lambda _message: None)
    assert events == ["freed", 8, "freed", 4, "freed"]


def test_not_even_one_image_fitting_leaves_nothing():
    assert sweep(0, [4])[0] == []


def test_the_smallest_batch_near_the_best_rate_is_recommended():
    times = [batch_time(2**power) for power in range(11)]
    chosen = recommended_batch_size(times)
    best = max(time.images_per_s for time in times)
    assert batch_time(chosen).images_per_s >= 0.95 * best > batch_time(chosen // 2).images_per_s
