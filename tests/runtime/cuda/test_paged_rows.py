"""Captured steps over rows in pages: the same bits as over whole rows, uncaptured, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

pytest.importorskip("triton")

from runtime.cuda.kernels import attention as kernels
from runtime.cuda.kernels.attention import attend
from runtime.cuda.kernels.new_tokens import write
from runtime.kv.pages import places as places_module
from runtime.kv.pages.places import PAGE, Paged
from runtime.kv.row_cache import RowCache, row_cache
from runtime.kv.storage import Storage
from runtime.serving.request import Request
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from runtime.serving.steps.row_pages import RowPages
from tests.helpers import interpreter
from tests.helpers.architectures import architecture_model
from tests.helpers.breaking import drain
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.serving import greedy
from tests.helpers.tiny import tiny_model
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
    memories: list[tuple[Tensor, Tensor, Paged | None]] = [(keys, values, None)]
    paged_keys, paged_values = (in_pages(one, table_RN, 11) for one in (keys, values))
    memories.append((paged_keys, paged_values, Paged(table_RN, PAGE)))
    found = []
    for some_keys, some_values, places in memories:
        write(new_keys, new_values, some_keys, some_values, rows, positions, places)
        given: dict[str, Any] = {"scale": 0.3, "window": window, "paged": places}
        plain = attend(query, some_keys, some_values, rows, positions, **given)
        padded = attend(query, some_keys, some_values, rows, positions, real_RC=real, **given)
        found.append(torch.stack([plain, padded]))
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def grown(cache: RowCache, lengths: dict[int, int]) -> RowCache:
    """The cache with room for these tokens of its rows, the last row's first."""
    for row, length in reversed(lengths.items()):
        assert cache.pages is None or cache.pages.grow(row, length)
    return cache


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "qwen3_next"])
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


# ---------------------------------------------------------------------- served

SHORT, LONGEST_ROW = 16, 48
SERVED: dict[str, Any] = {"batch": 3, "rows": 3, "context": LONGEST_ROW, "chunk": 24}


@pytest.fixture
def _short_pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages of so few positions that tiny sequences take several."""
    monkeypatch.setattr(kernels, "LONGEST", SHORT)
    monkeypatch.setattr(places_module, "PAGE", SHORT)
    with fake_cuda(monkeypatch):
        yield


def paged_engine(model: Any, num_pages: int, **options: Any) -> Any:
    sizes: dict[str, Any] = {"batch": 3, "context": LONGEST_ROW, "cache_tokens": num_pages * SHORT}
    return load_fake(model, memory=0.75, **sizes, **options).expertflow


def asked(count: int, max_tokens: int = 4) -> list[Request]:
    """Of prompts that nearly fill a page."""
    random = np.random.default_rng(2)
    drawn = [random.integers(2, 256, 14 + number).tolist() for number in range(count)]
    return [Request(id=str(i), prompt=ids, max_tokens=max_tokens) for i, ids in enumerate(drawn)]


@pytest.mark.usefixtures("_short_pages")
@pytest.mark.parametrize(("kind", "compile"), [("olmoe", False), ("gpt_oss", True)])
def test_served_tokens_are_those_of_each_request_alone_where_pages_run_out(
    kind: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences of two pages each, of which there are three; admission knows nothing of it."""
    torch._dynamo.reset()
    counters.clear()
    model: Any = tiny_model(kind, num_hidden_layers=2)
    requests = asked(2)
    alone = [greedy(model, request.prompt, 4) for request in requests]  # type: ignore[arg-type]
    engine = paged_engine(model, 3, compile=compile)
    loop = ServingLoop(engine, None, ServeSettings(**SERVED))
    count = loop._cache.pages.count  # type: ignore[union-attr]
    monkeypatch.setattr(RowPages, "ahead", lambda _, one: count(len(one.token_ids)))
    for request in requests:
        loop.submit(request)
    served = drain(loop)
    assert [served[request.id].token_ids for request in requests] == alone
    assert loop.num_displaced == 1
    assert not counters["graph_break"]
    engine.check_integrity()


@pytest.mark.usefixtures("_short_pages")
def test_one_memory_serves_two_loops_and_generates_in_turn() -> None:
    """Captured steps stay; the table says whose pages they read."""
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    requests = asked(2, 3)
    alone = {one.id: greedy(model, one.prompt, 3) for one in requests}  # type: ignore[arg-type]
    engine = paged_engine(model, 5)
    loops = [ServingLoop(engine, None, ServeSettings(**SERVED)) for _ in range(2)]
    for number in range(3):
        loop = loops[number % 2]
        for request in requests[:: 1 if number else -1]:
            loop.submit(request)
        assert {id: result.token_ids for id, result in drain(loop).items()} == alone
        assert greedy(model, requests[0].prompt, 3) == alone["0"]  # type: ignore[arg-type]
        assert engine.decode_path == "graph"
    engine.check_integrity()


@pytest.mark.usefixtures("_short_pages")
def test_generating_more_sequences_than_whole_rows_fit_says_why_it_is_not_captured() -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    ids = torch.tensor([one.prompt[:5] for one in asked(2)])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(ids, **options)
    engine = paged_engine(model, 5)
    with pytest.warns(UserWarning, match="cache_tokens=80 have room for 1 of 48 tokens"):
        found = model.generate(ids, **options)
    assert torch.equal(found, expected)
    assert "cache_tokens=80" in engine.decode_path


@pytest.mark.usefixtures("_short_pages")
def test_what_was_reserved_is_the_most_that_may_be_asked_for() -> None:
    engine = paged_engine(tiny_model("olmoe", num_hidden_layers=2), 4)
    with pytest.raises(ValueError, match=r"cache_tokens=80 needs runtime.load\(..., cache_tokens="):
        list(engine.serve(asked(1), cache_tokens=80))
