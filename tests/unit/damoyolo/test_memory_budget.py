import threading
import time
from concurrent.futures import ThreadPoolExecutor

from damoyolo.memory_budget import MemoryBudget


def test_what_runs_at_the_same_time_never_takes_more_than_the_budget():
    budget = MemoryBudget(10)
    lock = threading.Lock()
    used, peaks = [], []

    def work(size):
        with budget.reserve(size):
            with lock:
                used.append(size)
                peaks.append((sum(used), len(used)))
            time.sleep(0.002)
            with lock:
                used.remove(size)
        return size

    sizes = [3, 4, 5, 10, 1, 7, 25, 2] * 6
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, sizes, timeout=30)) == sizes
    assert all(total <= 10 or alone == 1 for total, alone in peaks)
    assert max(count for _, count in peaks) > 1


def test_an_error_gives_the_bytes_back():
    budget = MemoryBudget(10)
    for _ in range(3):
        try:
            with budget.reserve(99):
                raise ValueError
        except ValueError:
            pass
    with budget.reserve(10):
        pass


def test_groups_keep_the_order_and_fit_or_are_alone():
    sizes = [(0, 4), (1, 6), (2, 1), (5, 30), (6, 9), (7, 2)]
    assert MemoryBudget(10).groups(sizes) == [[0, 1], [2], [5], [6], [7]]
    assert MemoryBudget(100).groups(sizes) == [[0, 1, 2, 5, 6, 7]]
    assert MemoryBudget(10).groups([]) == []
