"""Prompts that run once: the choices of one prompt, and requests that begin as others did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runtime
from routing.shards import TraceReader
from runtime.engine.engine import Engine
from runtime.kv.row_cache import RowCache
from runtime.serving.request import Request, Result
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from runtime.serving.steps import rows as rows_module
from runtime.serving.steps.rows import Rows
from tests.helpers.breaking import drain
from tests.helpers.serving import SCHEDULERS, SMALL, by_id, greedy, offloaded, prompts
from tests.helpers.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "olmoe": {}, "mixtral": {"sliding_window": 5}, "qwen3_moe": {}, "gpt_oss": {},
}  # fmt: skip
PROMPT = prompts(4, 1, 40)[0] + list(range(20, 40))
OPTIONS = SMALL | {"context": 96}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = tiny_model("olmoe", num_hidden_layers=2)
    with offloaded(model, tmp_path_factory.mktemp("prefixes")) as engine:
        yield engine


def loop_of(engine: Engine, **options: Any) -> ServingLoop:
    return ServingLoop(engine, None, ServeSettings(**OPTIONS | options))


def serve(loop: ServingLoop, requests: Sequence[Request]) -> dict[str, Result]:
    for request in requests:
        loop.submit(request)
    return drain(loop)


def choices(count: int, **options: Any) -> list[Request]:
    options = {"max_tokens": 8, "temperature": 1.0, "logprobs": 3, "ignore_eos": True} | options
    return [Request(id=str(i), prompt=PROMPT, seed=i, group="one", **options) for i in range(count)]


# ---------------------------------------------------------------------- choices


BRIEF = {("fifo", 2), ("fifo", 9), ("predicted", 3), ("predicted", 9), ("paper", 3),
         ("domain-oracle", 2)}  # fmt: skip
CHOICES = [
    pytest.param(*one, marks=[] if one in BRIEF else pytest.mark.exhaustive)
    for one in product(SCHEDULERS, (2, 3, 9))
]


@pytest.mark.parametrize(("scheduler", "count"), CHOICES)
def test_the_prompt_of_several_choices_runs_once(
    scheduler: str, count: int, engine: Engine
) -> None:
    alone = {
        request.id: by_id(engine.serve([request], **OPTIONS))[request.id].token_ids
        for request in choices(count)
    }
    loop = loop_of(engine, scheduler=scheduler)
    served = serve(loop, choices(count))
    assert {id: result.token_ids for id, result in served.items()} == alone
    assert loop.num_prefilled == len(PROMPT)
    assert loop.num_reused == (count - 1) * len(PROMPT)


def test_choices_choose_their_first_token_from_the_same_bits(engine: Engine) -> None:
    served = serve(loop_of(engine, scheduler="fifo"), choices(7, top_k=1))
    firsts = {result.logprobs[0] for result in served.values()}
    assert len(firsts) == 1


def test_choices_that_are_cancelled_while_their_prompt_runs_leave_it_to_the_others(
    engine: Engine,
) -> None:
    alone = greedy(engine.model, PROMPT, 8)
    for cancelled in range(3):
        loop = loop_of(engine, scheduler="fifo")
        for request in choices(5, temperature=0.0, logprobs=None):
            loop.submit(request)
        loop.step()
        loop.cancel(str(cancelled))
        served = drain(loop)
        assert served.pop(str(cancelled)).finish == "cancelled"
        assert {result.token_ids for result in served.values()} == {alone}


def test_prompts_of_one_group_that_differ_run_each(engine: Engine) -> None:
    pool = prompts(8, 4)
    asked = [Request(id=str(i), prompt=p, max_tokens=5, group="a") for i, p in enumerate(pool)]
    loop = loop_of(engine)
    served = serve(loop, asked)
    assert loop.num_prefilled == sum(map(len, pool)) and loop.num_reused == 0
    for i, prompt in enumerate(pool):
        assert served[str(i)].token_ids == greedy(engine.model, prompt, 5)


def test_requests_without_a_group_share_nothing_unless_told_to(engine: Engine) -> None:
    loop = loop_of(engine)
    asked = [Request(id=str(i), prompt=PROMPT, max_tokens=5) for i in range(3)]
    served = serve(loop, asked)
    assert loop.num_reused == 0
    assert {result.token_ids for result in served.values()} == {greedy(engine.model, PROMPT, 5)}


def test_a_prompt_whose_log_probabilities_are_asked_for_runs_whole() -> None:
    class Asking:
        prompt_logprobs = 0

    class Sequence_:
        request = Asking()

    assert rows_module.wants_whole_prompt(Sequence_())  # type: ignore[arg-type]


# ---------------------------------------------------------------------- beginnings


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_goes_on_from_the_beginning_that_another_ran(kind: str, tmp_path: Path) -> None:
    model: Any = tiny_model(kind, **KINDS[kind])
    branches = [PROMPT + [50 + i] * (3 + i) for i in range(4)]
    alone = [greedy(model, branch, 6) for branch in branches]
    with offloaded(model, tmp_path) as engine:
        loop = loop_of(engine, prefix_reuse=True)
        for i, branch in enumerate(branches):
            served = serve(loop, [Request(id="it", prompt=branch, max_tokens=6)])
            assert served["it"].token_ids == alone[i]
        assert loop.num_reused == 3 * len(PROMPT)
        engine.check_integrity()


def test_a_conversation_goes_on_from_its_last_answer(engine: Engine) -> None:
    loop = loop_of(engine, prefix_reuse=True)
    turns = list(PROMPT[:20])
    for turn in range(3):
        alone = greedy(engine.model, turns, 6)
        before = loop.num_reused
        request = Request(id="it", prompt=turns, max_tokens=6, ignore_eos=True)
        said = serve(loop, [request])["it"].token_ids
        assert said[: len(alone)] == alone
        assert loop.num_reused - before == (0 if turn == 0 else len(turns) - 4)
        turns += [*said, 7, 8, 9]


def test_a_prompt_that_was_run_before_runs_its_last_token_only(engine: Engine) -> None:
    loop = loop_of(engine, prefix_reuse=True)
    for _ in range(2):
        served = serve(loop, [Request(id="it", prompt=PROMPT, max_tokens=5)])
        assert served["it"].token_ids == greedy(engine.model, PROMPT, 5)
    assert loop.num_prefilled == len(PROMPT) + 1


def test_a_running_row_serves_a_beginning_and_is_left_as_it_was(engine: Engine) -> None:
    loop = loop_of(engine, prefix_reuse=True, scheduler="fifo")
    first = Request(id="first", prompt=PROMPT, max_tokens=20, ignore_eos=True)
    alone = serve(loop_of(engine), [first])["first"].token_ids
    loop.submit(first)
    for _ in range(10):
        loop.step()
    second = [*PROMPT[:30], 9, 9]
    loop.submit(Request(id="second", prompt=second, max_tokens=5))
    served = drain(loop)
    assert served["first"].token_ids == alone and loop.num_reused == 30
    assert served["second"].token_ids == greedy(engine.model, second, 5)


def test_what_a_request_left_that_ended_in_an_error_is_not_used(engine: Engine) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("the reader is gone")

    loop = loop_of(engine, prefix_reuse=True)
    serve(loop, [Request(id="bad", prompt=PROMPT, max_tokens=5, on_token=fail)])
    serve(loop, [Request(id="good", prompt=PROMPT, max_tokens=5)])
    assert loop.num_reused == 0


def test_rows_are_taken_over_the_oldest_first_and_a_small_part_is_copied(engine: Engine) -> None:
    loop = loop_of(engine, prefix_reuse=True, batch=2, rows=2, scheduler="fifo")
    long = Request(id="long", prompt=PROMPT, max_tokens=20, ignore_eos=True)
    serve(loop, [long])
    serve(loop, [Request(id="part", prompt=[*PROMPT[:10], 5], max_tokens=2)])
    assert loop.num_reused == 10
    serve(loop, [Request(id="again", prompt=PROMPT, max_tokens=2)])
    assert loop.num_reused == 10 + len(PROMPT) - 1


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**16),
    scheduler=st.sampled_from(SCHEDULERS),
    rows=st.integers(1, 5),
    chunk=st.integers(1, 20),
)
def test_no_reuse_changes_a_token(
    engine: Engine, seed: int, scheduler: str, rows: int, chunk: int
) -> None:
    random = np.random.default_rng(seed)
    stems = prompts(seed, 2, 20)
    asked, alone = [], {}
    for i in range(8):
        stem = stems[random.integers(2)]
        prompt = [*stem, *random.integers(2, 5, random.integers(1, 4)).tolist()]
        group = ["", "a"][random.integers(2)]
        asked.append(Request(id=str(i), prompt=prompt, max_tokens=4, group=group))
        alone[str(i)] = greedy(engine.model, prompt, 4)
    options = {"batch": rows, "rows": rows + 1, "chunk": chunk, "scheduler": scheduler}
    loop = loop_of(engine, prefix_reuse=True, **options)
    served = serve(loop, asked)
    assert {id: result.token_ids for id, result in served.items()} == alone
    engine.check_integrity()


# ---------------------------------------------------------------------- what hangs on it


def test_recorded_routes_of_reused_tokens_are_those_that_ran(tmp_path: Path) -> None:
    recorded = []
    for reuse in (False, True):
        folder = tmp_path / str(reuse)
        model: Any = runtime.load(tiny_model("olmoe"), memory=0.5, record=folder)
        with model.expertflow as engine:
            loop = loop_of(engine, prefix_reuse=reuse, scheduler="fifo")
            for i in range(3):
                asked = [Request(id="it", prompt=[*PROMPT, 50 + i], max_tokens=4)]
                serve(loop, [*asked, *(choices(4, logprobs=None) if i == 2 else [])])
            assert loop.num_reused >= 3 * len(PROMPT), "choices share in either case"
        reader = TraceReader(folder)
        found = list(reader.documents())
        recorded.append(
            sorted((one.token_ids_T.tolist(), one.experts_TLK.tolist()) for one in found)
        )
    assert recorded[0] == recorded[1] and len(recorded[0]) == 7


def test_what_others_wrote_to_the_rows_is_run_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a GPU's storage serves `generate` between two steps."""
    asked = choices(5, temperature=0.0, logprobs=None, max_tokens=12)
    alone = serve(loop_of(engine), asked)
    loop = loop_of(engine, prefix_reuse=True, chunk=400)
    claims = 0

    def claim(cache: Any) -> bool:
        nonlocal claims
        claims += 1
        if claims % 13:
            return True
        for layer in cache.layers:
            if layer.keys is not None:
                layer.keys.fill_(torch.nan)
        return False

    monkeypatch.setattr(RowCache, "claim", claim)
    served = serve(loop, asked)
    assert {id: result.token_ids for id, result in served.items()} == {
        id: result.token_ids for id, result in alone.items()
    }
    assert claims > 26


def test_rows_that_are_lost_over_and_over_end_their_requests_with_the_reason(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loop_of(engine)
    monkeypatch.setattr(RowCache, "claim", lambda _: False)
    served = serve(loop, choices(5))
    assert {result.fault for result in served.values()} == {"server"}
    assert all("let one end before" in result.error for result in served.values())


def test_state_that_cannot_be_cut_is_refused_by_name() -> None:
    class Config:
        layer_types = ("full_attention", "linear_attention")

    with pytest.raises(ValueError, match=r"prefix_reuse: .* linear_attention"):
        Rows(None, Config(), reuse=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 8.0,
         "short_factor": [1.0] * 4, "long_factor": [9.0] * 4},
        {"rope_type": "dynamic", "factor": 8.0},
    ],
)  # fmt: skip
def test_positions_that_depend_on_the_company_are_refused_beyond_where_they_do(
    rope: dict[str, Any],
) -> None:
    limits = {"max_position_embeddings": 33 if rope["rope_type"] == "dynamic" else 256}
    model: Any = tiny_model("olmoe", rope_parameters=rope | {"rope_theta": 1e4}, **limits)
    asked = [Request(id=str(i), prompt=p, max_tokens=4) for i, p in enumerate(prompts(5, 4, 20))]
    alone = {r.id: greedy(model, r.prompt, 4) for r in asked}  # type: ignore[arg-type]
    with offloaded(model) as engine:
        with pytest.raises(ValueError, match=r"context=33: .* serve with context=32 or less"):
            engine.serve(asked, **SMALL | {"context": 33})
        served = by_id(engine.serve(asked, **SMALL | {"context": 32}))
    assert {id: result.token_ids for id, result in served.items()} == alone
