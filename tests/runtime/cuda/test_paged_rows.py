"""Captured steps over rows in pages: the same bits as over whole rows, uncaptured, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda.kernels.attention import attend, write
from runtime.kv.pages.places import PAGE, Paged
from runtime.kv.row_cache import RowCache, row_cache
from runtime.kv.storage import Storage
from tests.helpers import interpreter
from tests.helpers.architectures import architecture_model
from tests.runtime.cuda.test_graph_step import with_chunks
from tests.runtime.cuda.test_row_step import continued, ids_of, run_prompt, step_of

interpreter.mend()
CONTEXT = 3 * PAGE


@pytest.fixture(autouse=True)
def _not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


def in_pages(states_RGCD: Tensor, table_RN: Tensor, num_pages: int) -> Tensor:
    """The same entries, each page where the table says."""
    rows, groups, context, width = states_RGCD.shape
    pages = torch.full((num_pages, groups, PAGE, width), float("nan"), dtype=states_RGCD.dtype)
    pieces = states_RGCD.view(rows, groups, context // PAGE, PAGE, width).transpose(1, 2)
    pages[table_RN] = pieces
    return pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 256])
@pytest.mark.parametrize("window", [None, 80])
def test_attention_over_pages_gives_the_bits_of_whole_rows(
    dtype: torch.dtype, width: int, window: int | None
) -> None:
    """Wide heads take several blocks of a page."""
    table_RN = torch.randperm(11, generator=torch.Generator().manual_seed(0))[:9].view(3, 3).int()
    keys, values = torch.randn(2, 3, 2, CONTEXT, width).to(dtype)
    new_keys, new_values = torch.randn(2, 3, 2, width).to(dtype)
    query, rows = torch.randn(3, 4, width).to(dtype), torch.tensor([2, 0, 1])
    positions = torch.tensor([CONTEXT - 1, 70, 63])
    real = torch.rand(3, CONTEXT) < 0.7
    paged, found = Paged(table_RN, PAGE), []
    memories = [(keys, values, None)]
    memories.append((*(in_pages(one, table_RN, 11) for one in (keys, values)), paged))
    for *memory, place in memories:
        write(new_keys, new_values, *memory, rows, positions, place)
        options: dict[str, Any] = {"window": window, "paged": place}
        plain = attend(query, *memory, rows, positions, 0.3, **options)
        padded = attend(query, *memory, rows, positions, 0.3, real_RC=real, **options)
        found.append(torch.stack([plain, padded]))
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def grown(cache: RowCache, lengths: dict[int, int]) -> RowCache:
    """The cache with room for these tokens of its rows, the last row's first."""
    for row, length in reversed(lengths.items()):
        assert cache.pages is None or cache.pages.grow(row, length)
    return cache


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "llama4_text", "qwen3_next"])
def test_steps_over_pages_give_the_bits_of_whole_rows(kind: str) -> None:
    """In the engine's storage, where what others left is not finite."""
    model: Any = with_chunks(architecture_model(kind))
    lengths = {2: 9, 0: 1}
    found = []
    for tokens in (None, 4 * PAGE):
        storage = Storage(3, CONTEXT, tokens)
        cache = grown(row_cache(model, 3, CONTEXT, storage), {2: 12, 0: 4})
        run_prompt(model, cache, 2, ids_of(2))
        for tensor in cache.by_position:
            tensor.fill_(float("nan"))
        first = {row: run_prompt(model, cache, row, ids_of(row)) for row in lengths}
        next_tokens = {row: int(logits_V.argmax()) for row, logits_V in first.items()}
        logits = continued(model, step_of(model, cache, 4), next_tokens, lengths, 3)
        found.append(torch.stack([one for row in lengths for one in [first[row], *logits[row]]]))
    assert found[0].isfinite().all()
    assert torch.equal(*found)
