"""A worker takes no more threads than its container may run at a time."""

import pytest

from damoyolo.cores import usable_cores


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("6400000 100000", 16),
        ("max 100000", 16),
    ],
)
def test_a_limit_of_cgroups_2_is_kept(tmp_path, limit, cores):
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("250000", 3), ("-1", 16)])
def test_a_limit_of_cgroups_1_is_kept(tmp_path, quota, cores):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path) == cores


def test_without_a_limit_all_cores_that_it_may_run_on_count(tmp_path):
    assert usable_cores(tmp_path) == 16


def test_a_limit_that_cannot_be_read_is_none(tmp_path):
    (tmp_path / "cpu.max").write_text("nonsense")
    assert usable_cores(tmp_path) == 16
