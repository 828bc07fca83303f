"""Run tasks in processes of which each may die: its task counts as failed, and another process goes on."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Task = TypeVar("Task")
STOP_TIMEOUT_S = 2.0


def run_tasks(
    function: Callable[[Task], Any], tasks: Sequence[Task], processes: int, budget_s: float
) -> Iterator[tuple[Task, Any, str | None]]:
    """Each task with its result or with what went wrong, in the order in which they end.

    function, tasks: can be pickled; the function is imported in fresh processes. Tasks are started in their
    order. budget_s: after so many seconds, what is not done is reported as such and its process is killed.
    """
    deadline = time.monotonic() + budget_s
    waiting = list(range(len(tasks)))[::-1]
    # A pipe for each process: one that is killed cannot take a lock with it that the others need.
    workers: dict[Connection, tuple[BaseProcess, int]] = {}

    def start() -> None:
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.get_context("spawn").Process(
            target=_work, args=(function, theirs), daemon=True
        )
        worker.start()
        theirs.close()
        give(ours, worker)

    def give(connection: Connection, worker: BaseProcess) -> None:
        index = waiting.pop()
        workers[connection] = worker, index
        connection.send(tasks[index])

    try:
        for _ in range(min(processes, len(tasks))):
            start()
        while workers and time.monotonic() < deadline:
            for connection in wait(list(workers), timeout=deadline - time.monotonic()):
                assert isinstance(connection, Connection)
                worker, index = workers.pop(connection)
                try:
                    result, error = connection.recv()
                except (EOFError, OSError):
                    worker.join(STOP_TIMEOUT_S)
                    if waiting:
                        start()
                    yield tasks[index], None, f"its process ended with exit code {worker.exitcode}"
                    continue
                if waiting:
                    give(connection, worker)
                yield tasks[index], result, error
    finally:
        for worker, _ in workers.values():
            worker.kill()
    for index in [*(index for _, index in workers.values()), *waiting[::-1]]:
        yield tasks[index], None, f"not done within {budget_s:g} s"


def _work(function: Callable[[Any], Any], connection: Connection) -> None:
    """The main function of a process, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, str | None] = function(task), None
        except Exception as error:  # a boundary: whatever a task raises is its result
            answer = None, f"{type(error).__name__}: {str(error)[:300]}"
        connection.send(answer)
