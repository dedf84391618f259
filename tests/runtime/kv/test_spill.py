"""Pages in host memory: which of them there are, what they hold, and that no logit tells them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.kv.pages import places
from runtime.kv.pages.page_table import PageTable
from runtime.kv.pages.places import Spilled
from runtime.kv.pages.spill import bytes_seen, move_pages, with_spilled
from runtime.kv.row_cache import RowCache, row_cache
from runtime.kv.saved_row import SavedRow, copy_row
from runtime.kv.size import page_bytes, storage_bytes
from runtime.kv.state_kinds import Mask
from runtime.kv.storage import Storage, StorageSize
from runtime.kv.token_layout import Span
from tests.helpers.architectures import architecture_model
from tests.runtime.kv.test_pages import CONTEXT, CPU, PAGE, ROWS, run

KINDS = ("olmoe", "gpt_oss", "llama4_text", "qwen3_next")


class Memory:
    """A table, and the numbers that rows have written, each page where the table says."""

    def __init__(self, num_pages: int, num_host_pages: int) -> None:
        self.table = PageTable(
            ROWS, CONTEXT, num_pages, PAGE, lambda like: like.new_zeros(ROWS, like.shape[1]),
            num_host_pages,
        )  # fmt: skip
        self.device = torch.full((num_pages, 1, PAGE, 1), -1.0)
        self.host = torch.full((num_host_pages, 1, PAGE, 1), -1.0)
        self.written: list[list[float]] = [[] for _ in range(ROWS)]
        self._next = 0.0

    def write(self, row: int, count: int) -> None:
        """New numbers behind those of a row, on the device."""
        for _ in range(count):
            at = len(self.written[row])
            page = self.table.of(row)[at // PAGE]
            assert page < self.table.num_pages, "what is written lies on the device"
            self.device[page, 0, at % PAGE] = self._next
            self.written[row].append(self._next)
            self._next += 1

    def settle(self) -> None:
        move_pages(self.device, self.host, self.table.take_moves())

    def check(self) -> None:
        """Every page has one owner or is free, and rows have what they wrote."""
        table = self.table
        owned = [page for row in range(ROWS) for page in table.of(row)]
        near = [page for page in owned if page < table.num_pages]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(table.num_pages + table.num_host_pages))
        assert len(near) == table.num_pages - table.num_free
        assert len(owned) - len(near) == table.num_spilled
        paged = table.sent_to(CPU)
        for row, expected in enumerate(self.written):
            away = table.spilled_of(row)
            places_of = [page - table.num_pages for page in table.of(row)]
            assert away == [page for page in places_of if page >= 0] == places_of[: len(away)]
            behind_N = paged.table_RN[row, len(table.of(row)) :]
            assert (behind_N < table.num_pages).all(), "whoever reads on reads the device"
            length = len(expected)
            found = paged.row(self.device, row, length, self.host)
            assert found.flatten().tolist() == expected
            pages = torch.tensor(table.of(row, length)[len(table.spilled_of(row, length)) :])
            kept = with_spilled(self.device[pages.long()], self.host, table.spilled_of(row, length))
            assert kept.flatten()[:length].tolist() == expected


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "spill", "back", "cut", "settle"]),
        st.integers(0, ROWS - 1), st.integers(0, 9),
    ),
    max_size=40,
)  # fmt: skip


@given(st.integers(1, 12), st.integers(0, 12), EVENTS)
def test_pages_that_come_and_go_keep_what_was_written(
    num_pages: int, num_host_pages: int, events: list[tuple[str, int, int]]
) -> None:
    """Copies may wait for each other, but not for what is read or written."""
    memory = Memory(num_pages, num_host_pages)
    table = memory.table
    for event, row, number in events:
        if event == "write":
            count = min(number, CONTEXT - len(memory.written[row]))
            if table.grow(row, len(memory.written[row]) + count):
                memory.settle()
                memory.write(row, count)
        elif event == "spill":
            full = {one: len(memory.written[one]) // PAGE for one in range(ROWS)}
            before, free = table.num_spilled, table.num_free
            spilled = table.spill(number, full)
            assert table.num_spilled == before + (number if spilled else 0)
            assert table.num_free == free + (number if spilled else 0)
        elif event == "back":
            has_any = bool(table.spilled_of(row)) and table.num_free > 0
            assert table.bring_back(row) == has_any
        elif event == "cut":
            asked = min(number, len(memory.written[row]))
            kept = table.cut(row, asked)
            assert asked - PAGE < kept <= asked
            del memory.written[row][kept:]
        else:
            memory.settle()
    memory.settle()
    memory.check()


def test_the_oldest_page_of_the_row_with_most_goes_and_the_newest_comes_back() -> None:
    table = Memory(9, 4).table
    assert table.grow(0, 5 * PAGE) and table.grow(1, 3 * PAGE)
    first, second = table.of(0)[0], table.of(0)[1]
    assert not table.spill(5, {0: 5, 1: 3})
    assert not table.spill(2, {1: 1})
    assert table.num_spilled == 0
    assert table.spill(2, {0: 4, 1: 3, 2: 7})
    assert table.of(0)[:2] == [9, 10] and table.num_free == 3
    assert [tuple(move) for move in table.take_moves()] == [(first, 9), (second, 10)]
    assert table.bring_back(0)
    assert table.spilled_of(0) == [0] and not table.bring_back(1)
    assert table.cut(0, PAGE - 1) == 0 and table.num_spilled == 0


def test_behind_the_end_of_a_row_that_had_pages_in_host_memory_is_the_device() -> None:
    """Prompts of about one length attend together: the shorter ones are read beyond their end."""
    memory = Memory(5, 4)
    table = memory.table
    assert table.grow(0, 3 * PAGE)
    memory.write(0, 3 * PAGE)
    assert table.spill(2, {0: 3})
    memory.settle()
    table.cut(0)
    assert table.grow(0, PAGE) and table.grow(1, 3 * PAGE)
    both = table.sent_to(CPU).copies(memory.device, torch.tensor([0, 1]), 3 * PAGE)
    assert both.shape == (2, 1, 3 * PAGE, 1)


def spilling(model: Any, num_pages: int = 10, num_host_pages: int = 12) -> RowCache:
    storage = Storage(ROWS, CONTEXT, num_pages * PAGE, num_host_pages * PAGE)
    return row_cache(model, ROWS, CONTEXT, storage)


def story(model: Any, cache: RowCache, *, spills: bool) -> list[Tensor]:
    """Single tokens behind prompts whose pages are sent away, copied, parked and brought back."""
    ids = torch.randint(2, 250, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(3))
    pages = cache.pages
    assert pages is not None

    def part(row: int, start: int, count: int) -> tuple[Span, Tensor]:
        return Span(row, start, count), ids[row, start : start + count]

    def spill(count: int, **full: int) -> None:
        if spills:
            assert pages.spill(count, {int(row[1:]): number for row, number in full.items()})

    found = [run(model, cache, [part(0, 0, 15)]), run(model, cache, [part(1, 0, 9)])]
    spill(3, r0=3, r1=1)
    found += [run(model, cache, [part(row, start, 1)]) for row, start in ((0, 15), (1, 9), (0, 16))]
    assert pages.grow(2, 9)
    copy_row(cache, 0, 2, 9)
    found.append(run(model, cache, [part(2, 9, 1)]))
    spill(2, r1=2)
    saved = SavedRow.of(cache, 0, 17)
    pages.cut(0)
    if spills:
        assert pages.bring_back(1)
    assert pages.grow(0, 18)
    saved.restore(cache, 0)
    found.append(run(model, cache, [part(0, 17, 3)]))
    found.append(run(model, cache, [part(1, 10, 2)]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_over_spilled_pages_are_those_over_pages_bit_by_bit(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that goes on in several tokens finds its first pages wherever they are."""
    monkeypatch.setattr(places, "PAGE", PAGE)
    model: Any = architecture_model(kind)
    near, away = spilling(model, 16), spilling(model)
    ways = story(model, near, spills=False), story(model, away, spills=True)
    assert all(torch.equal(one, other) for one, other in zip(*ways, strict=True))
    assert near.pages is not None and away.pages is not None
    assert near.pages.num_spilled == 0 and away.pages.num_moved == 6
    assert all(one.shape[0] == 10 for one in away.by_position)


@pytest.mark.parametrize(("mask", "pages"), [("causal", 5), ("sliding", 2), ("chunked", 1)])
def test_bytes_that_are_seen_leave_out_what_a_window_hides(mask: str, pages: int) -> None:
    """Of 5 pages of 4, by the token at 21 with a window of 10, or in its chunk of 8."""
    spilled = Spilled(torch.zeros(7, 2, PAGE, 8), torch.zeros(7, 2, PAGE, 6))
    layers = [(Mask(mask), spilled), (None, None)]
    assert bytes_seen(layers, 5, 21, PAGE, 10, 8) == pages * 2 * PAGE * (8 + 6) * 4


def test_a_storage_of_the_same_size_has_the_same_pages_in_host_memory() -> None:
    model: Any = architecture_model("olmoe")
    storage = Storage(3, 200, 256, 100)
    assert storage.size == StorageSize(3, 200, 256, 100)
    cache = row_cache(model, 3, 200, Storage(*storage.size))
    run(model, cache, [(Span(1, 0, 5), torch.arange(5))])
    spilled = [layer.spilled for layer in cache.layers]  # type: ignore[union-attr]
    assert sum(one.nbytes for pair in spilled for one in pair) == page_bytes(model, 100)
    assert cache.nbytes == storage_bytes(model, 3, 200, 256)
