"""How long a batch may begin work, by a clock of the test."""

import pytest

from damoyolo.errors import BatchTimeError
from damoyolo.time_budget import TimeBudget


def test_work_is_refused_from_the_limit_on_until_the_batch_ends():
    seconds = [100.0]
    budget = TimeBudget(10, lambda: seconds[0])
    with budget.batch():
        seconds[0] = 109.9
        budget.check()
        seconds[0] = 110.0
        with pytest.raises(BatchTimeError, match=r"longer than 10 s.*max_batch_seconds"):
            budget.check()
    budget.check()
    with budget.batch():
        budget.check()


def test_a_batch_that_fails_ends_too():
    budget = TimeBudget(1, iter((0.0, 5.0)).__next__)
    with pytest.raises(KeyError), budget.batch():
        raise KeyError
    budget.check()


def test_there_is_no_limit_by_default():
    budget = TimeBudget(clock=iter(()).__next__)  # the clock is not even read
    with budget.batch():
        budget.check()
