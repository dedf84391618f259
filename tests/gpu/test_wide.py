"""Streamed passes and captured steps of many rows on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import runtime
from runtime.cuda.kernels.attention import attend
from runtime.kv.pages.places import PAGE, Paged
from runtime.serving.request import Request
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.gpu.offloaded import needs_gpu
from tests.helpers.architectures import architecture_model
from tests.helpers.breaking import drain
from tests.helpers.wide_steps import watch_wide_steps

pytestmark = needs_gpu
ROWS, NEW = 96, 24


def requests(longest: int = 59, most_new: int = NEW) -> list[Request]:
    """All of `NEW` tokens, or of as many as `most_new` and fewer."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, longest + 1, 3 * ROWS)
    news = random.integers(NEW, most_new + 1, 3 * ROWS)
    return [
        Request(id=str(i), prompt=random.integers(2, 250, n).tolist(), max_tokens=int(new),
                ignore_eos=True)
        for i, (n, new) in enumerate(zip(lengths, news, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe", "gpt_oss", "mixtral", "qwen3_next"])
@pytest.mark.parametrize("memory", [0.4, 1.0])
def test_tokens_of_many_rows_are_those_of_each_request_alone(
    kind: str, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = watch_wide_steps(monkeypatch)
    stock: Any = architecture_model(kind, max_position_embeddings=256).cuda()
    model: Any = runtime.load(
        architecture_model(kind, max_position_embeddings=256), memory=memory, device="cuda",
        batch=ROWS, context=96, cpu_share=False,
    )  # fmt: skip
    asked = requests()
    with model.expertflow as engine:
        served = {
            result.id: result.token_ids
            for result in engine.serve(asked, batch=ROWS, rows=ROWS, context=96)
        }
        engine.check_integrity()
    assert launched
    assert max(launched) > 64
    ids = torch.Generator().manual_seed(0)
    for index in torch.randperm(len(asked), generator=ids)[:12].tolist():
        prompt = torch.tensor([asked[index].prompt], device="cuda")
        alone = stock.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert served[str(index)] == tuple(alone[0, prompt.shape[1] :].tolist())


CONTEXT, PAGES = 384, 260
"""Pages of 64 for 96 sequences of up to six each: fewer than half of what all could need."""


def served(
    kind: str, memory: float, asked: list[Request], **options: Any
) -> tuple[dict[str, tuple[int, ...]], ServingLoop]:
    """The tokens of each request, and the loop that has served them."""
    model: Any = runtime.load(
        architecture_model(kind, max_position_embeddings=512), memory=memory, device="cuda",
        batch=ROWS, context=CONTEXT, cpu_share=False, **options,
    )  # fmt: skip
    with model.expertflow as engine:
        settings = ServeSettings(batch=ROWS, rows=ROWS, context=CONTEXT, scheduler="fifo")
        loop = ServingLoop(engine, None, settings)
        for request in asked:
            loop.submit(request)
        found = {id: result.token_ids for id, result in drain(loop).items()}
        engine.check_integrity()
    return found, loop


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "llama4_text", "qwen3_next"])
@pytest.mark.parametrize("memory", [0.4, 1.0])
def test_tokens_over_pages_are_those_over_whole_rows(kind: str, memory: float) -> None:
    """Where sequences of mixed lengths have to wait for pages, and some are parked for others.

    They meet others in their steps, so a near-tie may fall otherwise; nearly all are the same.
    """
    asked = requests(200, 150)
    whole, _ = served(kind, memory, asked)
    paged, loop = served(kind, memory, asked, cache_tokens=64 * PAGES)
    assert loop._cache.pages is not None
    assert loop._cache.pages.num_free == PAGES
    same = sum(whole[one.id] == paged[one.id] for one in asked)
    print(f"{kind} {memory}: {same} of {len(asked)} the same, {loop.num_displaced} displaced")
    assert same >= 0.98 * len(asked)


@pytest.mark.parametrize("window", [None, 100])
def test_attention_over_pages_gives_the_bits_of_whole_rows(window: int | None) -> None:
    random = torch.Generator(device="cuda").manual_seed(0)
    rows, groups, context, width = 24, 4, 2048, 128

    def drawn(*shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, device="cuda", generator=random)
        return numbers.to(torch.bfloat16)

    keys, values = drawn(rows, groups, context, width), drawn(rows, groups, context, width)
    count = rows * context // PAGE
    table_RN = torch.randperm(count, device="cuda", generator=random).view(rows, -1).int()
    pages = []
    for states in (keys, values):
        pieces = states.view(rows, groups, -1, PAGE, width).transpose(1, 2)
        memory = torch.empty(count, groups, PAGE, width, dtype=states.dtype, device="cuda")
        memory[table_RN] = pieces
        pages.append(memory)
    query, at = drawn(rows, 16, width), torch.arange(rows, device="cuda")
    positions = torch.randint(0, context, (rows,), device="cuda", generator=random)
    whole = attend(query, keys, values, at, positions, 0.1, window)
    places = Paged(table_RN, PAGE)
    paged = attend(query, pages[0], pages[1], at, positions, 0.1, window, paged=places)
    assert torch.equal(whole, paged)
