"""Counts that are left for later: whoever reads them misses none, and none counts twice."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from runtime.cache.due_counts import DueCounts


def test_what_is_due_is_counted_once_and_not_before_it_is_read_or_there_is_time() -> None:
    counts, made = DueCounts(2), list[int]()

    def count(number: int) -> np.ndarray:
        made.append(number)
        return np.array([number, 1])

    counts.add(np.array([10, 20]))
    for number in (1, 2):
        counts.add_later(lambda number=number: count(number))  # type: ignore[misc]
    assert not made
    counts.catch_up()
    assert made == [1, 2]
    counts.add_later(lambda: count(3))
    assert counts.counts_L.tolist() == [16, 23]
    counts.counts_L[1] -= 3
    assert counts.counts_L.tolist() == [16, 20] and made == [1, 2, 3]


def test_a_count_that_fails_fails_once_and_the_others_are_made() -> None:
    counts = DueCounts(1)
    counts.add_later(lambda: np.array([1 // 0]))
    counts.add_later(lambda: np.array([5]))
    with pytest.raises(ZeroDivisionError):
        counts.catch_up()
    assert counts.counts_L.tolist() == [5]


def test_a_thread_that_reads_waits_for_what_another_is_counting() -> None:
    counts, begun, goes_on = DueCounts(1), threading.Event(), threading.Event()

    def slow() -> np.ndarray:
        begun.set()
        assert goes_on.wait(10)
        return np.array([7])

    counts.add_later(slow)
    one = threading.Thread(target=counts.catch_up)
    one.start()
    assert begun.wait(10)
    seen: list[int] = []
    other = threading.Thread(target=lambda: seen.append(int(counts.counts_L[0])))
    other.start()
    goes_on.set()
    one.join(10)
    other.join(10)
    assert seen == [7]
