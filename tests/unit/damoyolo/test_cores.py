"""The cores of a process: those that it may run on, and those that its container's quota pays for."""

import os

import pytest

from damoyolo import cores

ALLOWED = 8


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    """A host of eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(ALLOWED)))


def write_version_2(folder, text):
    (folder / "cpu.max").write_text(text)


def write_version_1(folder, quota, period=100000):
    (folder / "cpu").mkdir()
    (folder / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu/cpu.cfs_period_us").write_text(f"{period}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", ALLOWED),
        ("400000 100000\n", 4),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("1600000 100000\n", ALLOWED),
        ("nonsense\n", ALLOWED),
        ("100000 0\n", ALLOWED),
    ],
)
def test_a_quota_of_version_2_limits_the_cores(tmp_path, text, expected):
    write_version_2(tmp_path, text)
    assert cores.usable_cores(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [(-1, ALLOWED), (300000, 3), (10000, 1)])
def test_a_quota_of_version_1_limits_the_cores(tmp_path, quota, expected):
    write_version_1(tmp_path, quota)
    assert cores.usable_cores(tmp_path) == expected


def test_without_control_groups_all_allowed_cores_count(tmp_path):
    assert cores.usable_cores(tmp_path) == ALLOWED
