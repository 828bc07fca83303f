"""How many cores this process may use.

Neither Python nor PyTorch asks for the quota with which a container's limit is enforced: with a limit of 4 on
a host of 64 cores, 64 threads would share the time of 4 and wait for each other. Java does ask for it.
"""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Cores that this process may run on, or its container's CPU quota pays for, if those are fewer.

    A quota of 2.5 cores counts as 2: a third thread would have the others wait for it.

    cgroups: where the container's control groups are mounted; a container sees its own there.
    """
    allowed = len(os.sched_getaffinity(0))
    quota = _quota_cores(cgroups)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def _quota_cores(cgroups: Path) -> float | None:
    """CPU time per time; None where there is no limit, or no way to read it."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # version 2; version 1
        try:
            quota, period = " ".join((cgroups / file).read_text() for file in files).split()
            limit = float(quota) / float(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such files; "max" of version 2
            continue
        if limit > 0:  # -1: no limit, in version 1
            return limit
    return None
