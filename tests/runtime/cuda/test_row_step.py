"""Steps over any rows of the cache of sequences in flight, uncaptured, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda.decode.row_decoder import RowStep
from runtime.kv.row_cache import RowCache, row_cache
from runtime.kv.saved_row import SavedRow
from runtime.kv.storage import Storage
from runtime.kv.token_layout import Span, TokenLayout
from tests.helpers.architectures import architecture_model
from tests.helpers.fake_cuda import Stream
from tests.runtime.cuda.test_graph_step import StockExperts, by_the_library, with_chunks

CONTEXT = 24
KINDS = "olmoe qwen3_next lfm2_moe llama4_text zaya deepseek_v3 deepseek_v32 minimax".split()  # noqa: SIM905
LENGTHS = {2: 9, 0: 1, 3: 6}
"""Prompts of different lengths, by their rows."""


def ids_of(row: int) -> Tensor:
    random = torch.Generator().manual_seed(row)
    return torch.randint(2, 256, (1, LENGTHS[row]), generator=random)


@torch.no_grad()
def run_prompt(model: Any, cache: RowCache, row: int, ids_1T: Tensor, start: int = 0) -> Tensor:
    """A piece of a prompt, as a model runner has it: logits of its last token [V]."""
    layout = TokenLayout([Span(row, start, ids_1T.shape[1])], torch.device("cpu"))
    mask = cache.mask(layout)
    given = {} if mask is None else {"attention_mask": mask}
    with cache.attending(layout):
        output = model(
            input_ids=ids_1T, position_ids=layout.positions_B[None], past_key_values=cache,
            use_cache=True, **given,
        )  # fmt: skip
    logits_V: Tensor = output.logits[0, -1]
    return logits_V


@torch.no_grad()
def continued(
    model: Any, step: RowStep, tokens: dict[int, int], lengths: dict[int, int], count: int
) -> dict[int, list[Tensor]]:
    """Logits of `count` greedy steps of the rows that have `tokens` next."""
    rows = list(tokens)
    found: dict[int, list[Tensor]] = {row: [] for row in rows}
    for number in range(count):
        step.set_inputs([tokens[r] for r in rows], rows, [lengths[r] + number for r in rows])
        step._run()
        assert step.logits_BV is not None
        for row, logits_V in zip(rows, step.logits_BV, strict=False):
            found[row].append(logits_V.clone())
            tokens[row] = int(logits_V.argmax())
    return found


def step_of(model: Any, cache: RowCache, batch: int) -> RowStep:
    experts: Any = StockExperts()
    stream: Any = Stream()
    return RowStep(
        model.forward, cache, experts, batch=batch, device=torch.device("cpu"), stream=stream
    )


@pytest.fixture(autouse=True)
def _not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_different_positions_go_on_as_each_does_alone(kind: str, shared: bool) -> None:
    """Beside padding, in any order of rows, with a prompt in pieces."""
    model: Any = with_chunks(architecture_model(kind))
    storage = Storage(4, CONTEXT + 8) if shared else None
    cache = row_cache(model, 4, CONTEXT, storage)
    first = {}
    for row, length in LENGTHS.items():
        ids_1T = ids_of(row)
        cut = 0 if cache.runs_prompts_whole else length // 2
        if cut:
            run_prompt(model, cache, row, ids_1T[:, :cut])
        first[row] = run_prompt(model, cache, row, ids_1T[:, cut:], cut)
    tokens = {row: int(logits_V.argmax()) for row, logits_V in first.items()}
    found = continued(model, step_of(model, cache, 4), tokens, LENGTHS, 4)
    for row in LENGTHS:
        ids_1T = ids_of(row)
        want = by_the_library(model, ids_1T, torch.ones_like(ids_1T), 4)[0]
        got = torch.stack([first[row], *found[row]])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_next", "zaya", "deepseek_v32", "minimax"])
def test_a_row_that_was_parked_goes_on_in_another_bit_by_bit(kind: str) -> None:
    model: Any = architecture_model(kind)
    results = []
    for target in (2, 1):
        cache = row_cache(model, 4, CONTEXT)
        token = int(run_prompt(model, cache, 2, ids_of(2)).argmax())
        if target != 2:
            saved = SavedRow.of(cache, 2, LENGTHS[2])
            run_prompt(model, cache, 2, ids_of(3))  # another sequence has the row meanwhile
            saved.restore(cache, target)
        step = step_of(model, cache, 1)
        results.append(continued(model, step, {target: token}, {target: LENGTHS[2]}, 3)[target])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v3", "deepseek_v32", "qwen3_next"])
def test_numbers_that_were_not_finite_do_not_outlive_their_sequence(kind: str) -> None:
    """A row that had a NaN in it serves the next sequence as any other."""
    model: Any = architecture_model(kind)
    found = []
    for poisoned in (False, True):
        cache = row_cache(model, 4, CONTEXT)
        run_prompt(model, cache, 3, ids_of(2))
        for tensor in cache.by_position + cache.by_row:
            tensor.fill_(float("nan") if poisoned else 0.5)
        first = run_prompt(model, cache, 3, ids_of(3))
        step = step_of(model, cache, 2)
        logits = continued(model, step, {3: int(first.argmax())}, {3: LENGTHS[3]}, 2)[3]
        found.append(torch.stack([first, *logits]))
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2_moe", "minimax"])
def test_a_step_of_rows_that_is_taken_back_leaves_no_trace(kind: str) -> None:
    """As the warm-up before a capture does it."""
    model: Any = architecture_model(kind)
    logits = []
    for times in (0, 2):
        cache = row_cache(model, 4, CONTEXT)
        tokens = {row: int(run_prompt(model, cache, row, ids_of(row)).argmax()) for row in LENGTHS}
        step = step_of(model, cache, 4)
        step.set_inputs(list(tokens.values()), list(tokens), [LENGTHS[row] for row in tokens])
        saved = step.save()
        with torch.no_grad():
            for _ in range(times):
                step._run()
                step.restore(saved)
        logits.append(continued(model, step, tokens, LENGTHS, 1))
    assert all(torch.equal(*(one[row][0] for one in logits)) for row in LENGTHS)
