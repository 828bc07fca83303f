"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

# A container finds its own limits at the root of this file system.
CGROUP_ROOT = Path("/sys/fs/cgroup")


def usable_cores(cgroup_root: Path = CGROUP_ROOT) -> int:
    """The cores that it may run on; in a container no more than its limit of CPU time, rounded up.

    With more threads than that the container would use up its time early in each period and then stand
    still, all threads at once (`docker run --cpus 2`, or `limits: {cpu: 2}`, on a machine of 64 cores).
    """
    cores = len(os.sched_getaffinity(0))
    limit = _cpu_limit(cgroup_root)
    return cores if limit is None else min(cores, max(1, math.ceil(limit)))


def _cpu_limit(cgroup_root: Path) -> float | None:
    """The limit in cores, of control groups of version 2 or 1; None without one."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = map(float, " ".join((cgroup_root / name).read_text() for name in names).split())
        except (OSError, ValueError):  # no such file; "max", or -1 below, is no limit
            continue
        return quota / period if quota > 0 and period > 0 else None
    return None
