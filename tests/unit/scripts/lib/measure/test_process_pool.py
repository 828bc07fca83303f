"""Tasks in processes of their own: results, errors, deaths, and the time for all."""

import os
import signal
import time

from lib.measure.process_pool import run_tasks


def work(task):
    if task == "fail":
        raise ValueError("no such thing")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "sleep":
        time.sleep(600)
    return task * 2


def outcomes(tasks, processes, budget_s=60.0):
    return {task: (result, error) for task, result, error in run_tasks(work, tasks, processes, budget_s)}


def test_a_task_that_fails_or_dies_costs_only_itself():
    found = outcomes(["fail", "die", "a", "b"], processes=2)
    assert found["a"] == ("aa", None)
    assert found["b"] == ("bb", None)
    assert found["fail"] == (None, "ValueError: no such thing")
    assert found["die"] == (None, "its process ended with exit code -9")


def test_what_is_not_done_in_time_is_reported_and_stopped():
    started = time.monotonic()
    found = outcomes(["sleep"], processes=1, budget_s=3.0)
    assert found == {"sleep": (None, "not done within 3 s")}
    assert time.monotonic() - started < 60
