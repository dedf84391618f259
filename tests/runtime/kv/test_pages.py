"""Pages of the key/value cache: who has which, and that attention does not tell them from rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.kv.pages import places
from runtime.kv.pages.page_table import PageTable
from runtime.kv.pages.places import Paged, WholeRows
from runtime.kv.row_cache import RowCache, row_cache
from runtime.kv.saved_row import SavedRow, copy_row
from runtime.kv.size import storage_bytes
from runtime.kv.static_cache import shared_cache
from runtime.kv.storage import Storage
from runtime.kv.token_layout import Span, TokenLayout
from tests.helpers.architectures import architecture_model

CPU = torch.device("cpu")
ROWS, CONTEXT, PAGE = 4, 24, 4
KINDS = ("olmoe", "gpt_oss", "llama4_text", "qwen3_next")
"""Full, sliding and chunked attention; full attention beside a recurrence."""


def table_of(num_pages: int) -> PageTable:
    return PageTable(
        ROWS, CONTEXT, num_pages, PAGE, lambda like: like.new_zeros(ROWS, like.shape[1])
    )


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, CONTEXT), st.booleans())),
)
def test_every_page_is_free_or_has_one_owner(
    num_pages: int, changes: list[tuple[int, int, bool]]
) -> None:
    table = table_of(num_pages)
    for row, num_tokens, grows in changes:
        before, free = list(table.of(row)), table.num_free
        assert table.lacks(row, num_tokens) == (table.count(num_tokens) > len(before))
        if not grows:
            table.cut(row, num_tokens)
            assert table.of(row) == before[: table.count(num_tokens)]
        elif table.grow(row, num_tokens):
            assert len(table.of(row)) == max(len(before), table.count(num_tokens))
            assert table.of(row)[: len(before)] == before
        else:
            assert table.of(row) == before
            assert table.count(num_tokens) - len(before) > free
        owned = [page for one in range(ROWS) for page in table.of(one)]
        assert len(set(owned)) == len(owned) == num_pages - table.num_free
        assert set(owned) <= set(range(num_pages))
        sent = table.sent_to(CPU).table_RN
        for one in range(ROWS):
            assert sent[one, : len(table.of(one))].tolist() == table.of(one)


def test_a_row_in_pages_reads_and_writes_as_one_in_one_piece() -> None:
    table = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)
    paged, whole = Paged(table, PAGE), WholeRows()
    rows, pages = torch.zeros(2, 3, 3 * PAGE, 5), torch.zeros(6, 3, PAGE, 5)
    for row, positions in ((0, range(11)), (1, range(7))):
        for position in positions:
            new = torch.randn(1, 3, 5)
            for memory, place in ((rows, whole), (pages, paged)):
                at, within = place.at(torch.tensor([row]), torch.tensor([position]))
                memory[at, :, within] = new
    for length in (1, 4, 5, 12):
        assert torch.equal(paged.row(pages, 1, length), whole.row(rows, 1, length))
        both = torch.tensor([1, 0])
        assert torch.equal(paged.copies(pages, both, length), whole.copies(rows, both, length))


@torch.no_grad()
def run(model: Any, cache: RowCache, parts: list[tuple[Span, Tensor]]) -> Tensor:
    """A step as a model runner has it: logits of all its tokens."""
    layout = TokenLayout([span for span, _ in parts], CPU)
    for span, _ in parts:
        if cache.pages is not None:
            assert cache.pages.grow(span.row, span.start + span.num_tokens)
    with cache.attending(layout):
        logits: Tensor = model(
            input_ids=torch.cat([ids for _, ids in parts])[None],
            position_ids=layout.positions_B[None], past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
    return logits


def story(model: Any, cache: RowCache) -> list[Tensor]:
    """Prompts together and in pieces, then a parked row, a copied one and single tokens."""
    ids = torch.randint(2, 250, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(3))

    def part(row: int, start: int, count: int) -> tuple[Span, Tensor]:
        return Span(row, start, count), ids[row, start : start + count]

    beginnings = [part(0, 0, 9), part(1, 0, 6), part(2, 0, 3)]
    if cache.stacks:
        found = [run(model, cache, [one]) for one in beginnings]
    else:
        found = [run(model, cache, beginnings)]
    found.append(run(model, cache, [part(0, 9, 7)]))
    saved = SavedRow.of(cache, 0, 16)
    if cache.pages is not None:
        cache.pages.cut(0)
        assert cache.pages.grow(3, 7)
        assert cache.pages.grow(0, 16)
    saved.restore(cache, 0)
    copy_row(cache, 1, 3, 6)
    for one in (part(0, 16, 1), part(3, 6, 1)):
        found.append(run(model, cache, [one]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_over_pages_are_those_over_whole_rows_bit_by_bit(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "PAGE", PAGE)
    model: Any = architecture_model(kind)
    whole = row_cache(model, ROWS, CONTEXT)
    paged = row_cache(model, ROWS, CONTEXT, tokens=10 * PAGE)
    for one, other in zip(story(model, whole), story(model, paged), strict=True):
        assert torch.equal(one, other)
    assert len({tensor.shape[0] for tensor in paged.by_position}) == 1
    assert paged.by_position[0].shape[::2] == (10, PAGE)


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v32"])
def test_what_is_no_plain_keys_and_values_keeps_whole_rows(kind: str) -> None:
    model: Any = architecture_model(kind)
    with pytest.raises(ValueError, match=r"cache_tokens=40: .* lies in whole rows"):
        row_cache(model, ROWS, CONTEXT, tokens=40)
    assert storage_bytes(model, 3, CONTEXT, 40) == storage_bytes(model, 3, CONTEXT)


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_next"])
def test_the_bytes_of_pages_are_counted_before_there_are_any(kind: str) -> None:
    model: Any = architecture_model(kind)
    storage = Storage(3, 200, 256)
    cache = row_cache(model, 3, 200, storage)
    run(model, cache, [(Span(1, 0, 5), torch.arange(5))])
    counted = storage_bytes(model, 3, 200, 256)
    assert counted == sum(tensor.nbytes for tensor in cache.by_position + cache.by_row)
    assert counted < storage_bytes(model, 3, 200)


def test_the_memory_of_pages_serves_a_few_whole_rows_in_turn() -> None:
    model: Any = architecture_model("olmoe")
    storage = Storage(4, 100, 256)
    assert storage.whole_rows == 2
    paged = row_cache(model, 4, 100, storage)
    run(model, paged, [(Span(2, 0, 5), torch.arange(5))])
    static = shared_cache(storage, model.config)
    keys, values = torch.randn(2, 2, 4, 7, 4)
    static.update(keys, values, 0)
    layer: Any = static.layers[0]
    assert layer.keys.data_ptr() == paged.by_position[0].data_ptr()
    assert layer.keys.shape[::2] == (2, 100)
