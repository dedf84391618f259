"""Cores: those of the process, one hardware thread each, no more than its quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.cpu.cores import split_cores, usable_cores


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Four cores of two hardware threads: 0 and 4, 1 and 5, ..."""
    for cpu in range(8):
        folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "cgroup").mkdir()
    allow(monkeypatch, set(range(8)))
    return tmp_path / "cpu", tmp_path / "cgroup"


def allow(monkeypatch: pytest.MonkeyPatch, cpus: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus, raising=False)


def test_one_thread_of_each_core(system: tuple[Path, Path]) -> None:
    assert usable_cores(*system) == [0, 1, 2, 3]


def test_only_those_that_the_process_may_use(
    system: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, {1, 4, 5, 6})
    assert usable_cores(*system) == [1, 4, 6]


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("nonsense", 4)],
)
def test_no_more_than_the_quota(system: tuple[Path, Path], quota: str, expected: int) -> None:
    (system[1] / "cpu.max").write_text(quota)
    assert len(usable_cores(*system)) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("200000", 2)])
def test_the_quota_of_older_systems(system: tuple[Path, Path], quota: str, expected: int) -> None:
    (system[1] / "cpu").mkdir()
    (system[1] / "cpu/cpu.cfs_quota_us").write_text(quota)
    (system[1] / "cpu/cpu.cfs_period_us").write_text("100000")
    assert len(usable_cores(*system)) == expected


def test_a_system_that_says_nothing_of_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, {2, 3})
    assert usable_cores(tmp_path, tmp_path) == [2, 3]


def test_two_cores_are_spared() -> None:
    assert split_cores([0, 2, 4, 6]) == ([4, 6], [0, 2])
    assert split_cores([0, 1]) == ([1], [0])
    assert split_cores([3]) == ([3], [])
