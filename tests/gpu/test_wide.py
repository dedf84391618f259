"""Streamed passes and captured steps of many rows on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import runtime
from runtime.cuda.kernels.attention import attend
from runtime.cuda.memory.pinned import PinnedMemory
from runtime.kv.pages.places import PAGE, Paged, Spilled
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


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "llama4_text", "qwen3_next"])
def test_tokens_over_spilled_pages_are_those_over_pages(kind: str) -> None:
    """A third of the pages on the device, and room for all others in host memory.

    They meet others in their steps, so a near-tie may fall otherwise; nearly all are the same.
    """
    asked = requests(200, 150)
    paged, _ = served(kind, 0.4, asked, cache_tokens=64 * PAGES)
    some = {"cache_tokens": 64 * (PAGES // 3), "spill_tokens": 64 * PAGES}
    found, loop = served(kind, 0.4, asked, **some)
    pages, stats = loop._cache.pages, loop._engine.stats()
    assert pages is not None
    assert (pages.num_free, pages.num_spilled) == (PAGES // 3, 0)
    assert pages.num_moved > PAGES // 3 and stats.bytes_spilled > 0
    same = sum(found[one.id] == paged[one.id] for one in asked)
    print(f"{kind}: {same} of {len(asked)} the same, {pages.num_moved} pages moved, "
          f"{stats.bytes_spilled / 1e6:.1f} MB read in place")  # fmt: skip
    assert same >= 0.98 * len(asked)


@pytest.mark.parametrize("compile", [False, True])
def test_a_few_rows_over_spilled_pages_get_the_tokens_of_each_alone(compile: bool) -> None:
    """In the captured steps of up to 32 rows; with a beginning that is reused, and a cancel."""
    model: Any = runtime.load(
        architecture_model("olmoe", max_position_embeddings=512), memory=0.4, device="cuda",
        batch=8, context=CONTEXT, cpu_share=False, cache_tokens=64 * 9, spill_tokens=64 * 40,
        compile=compile,
    )  # fmt: skip
    random = np.random.default_rng(1)
    prompts = [random.integers(2, 250, n).tolist() for n in (190, 130, 70, 10, 200, 190)]
    prompts[-1] = [*prompts[0][:150], *prompts[-1][150:]]
    asked = [Request(id=str(i), prompt=one, max_tokens=90, ignore_eos=True)
             for i, one in enumerate(prompts)]  # fmt: skip
    with model.expertflow as engine:
        alone = {}
        for one in asked:
            (result,) = engine.serve([one], batch=1, rows=1)
            alone[one.id] = result.token_ids
        settings = ServeSettings(
            batch=8, rows=8, context=CONTEXT, scheduler="fifo", prefix_reuse=True
        )
        loop = ServingLoop(engine, None, settings)
        pages, away = loop._cache.pages, []
        assert pages is not None
        for one in asked:
            loop.submit(one)
        found: dict[str, Any] = {}
        while not loop.is_idle:
            found |= {result.id: result for result in loop.step()}
            away.append(pages.num_spilled)
            if len(away) == 40:
                loop.cancel("3")
        assert max(away) > 0 and loop.num_displaced == 0 and loop.num_failed_steps == 0
        assert found.pop("3").finish == "cancelled"
        same = sum(result.token_ids == alone[id] for id, result in found.items())
        print(f"{same} of {len(found)} the same, at most {max(away)} pages away")
        assert same >= len(found) - 1, "a near-tie may fall otherwise"
        engine.check_integrity()


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
    pinned, near = PinnedMemory(), count // 3
    shape = count - near, *pages[0].shape[1:]
    spilled = Spilled(*(pinned.empty(shape, torch.bfloat16) for _ in pages))
    for states, others in zip(pages, spilled, strict=True):
        others.copy_(states[near:], non_blocking=True)
    some = [states[:near].clone() for states in pages]
    found = attend(
        query, some[0], some[1], at, positions, 0.1, window, paged=places, spilled=spilled
    )
    assert torch.equal(whole, found)
    pinned.close()
