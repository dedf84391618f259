"""Rows of captured steps: parked, shared and reused; and what else writes to their storage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from runtime.serving.request import Request
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers.breaking import POISON, drain, poison
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.serving import greedy, prompts
from tests.helpers.tiny import tiny_model

SMALL: dict[str, Any] = {"batch": 2, "rows": 2, "context": 24, "chunk": 16}
PROMPT, OTHER, *_ = prompts(3, 4, longest=9)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


def serving(model: Any, **options: Any) -> tuple[Any, ServingLoop]:
    engine = load_fake(model, None, memory=0.75, batch=2).expertflow
    return engine, ServingLoop(engine, None, ServeSettings(**SMALL | options))


def choices(count: int, max_tokens: int = 4) -> list[Request]:
    return [
        Request(id=str(i), prompt=PROMPT, max_tokens=max_tokens, ignore_eos=True, group="a")
        for i in range(count)
    ]


def test_choices_share_their_prompt_and_give_way_to_others() -> None:
    model: Any = tiny_model("olmoe")
    few, many = greedy(model, OTHER, 2), greedy(model, PROMPT, 4)
    engine, loop = serving(model)
    for request in choices(3):
        loop.submit(request)
    served = {result.id: result for result in loop.step()}
    loop.submit(Request(id="few", prompt=OTHER, max_tokens=2))
    served |= {result.id: result for result in loop.step()}
    assert loop._rows.num_parked == 1
    served |= drain(loop)
    assert served["few"].token_ids == few
    assert all(served[str(i)].token_ids[: len(many)] == many for i in range(3))
    assert loop.num_prefilled == len(PROMPT) + len(OTHER)
    engine.check_integrity()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_beginning_is_reused_under_a_sliding_window(kind: str) -> None:
    model: Any = tiny_model(kind, **({"sliding_window": 5} if kind == "mixtral" else {}))
    longer = [*PROMPT, *PROMPT][:12]
    asked = [longer, [*longer, 5, 6], [*longer[:9], 7]]
    alone = [greedy(model, prompt, 3) for prompt in asked]
    _, loop = serving(model, prefix_reuse=True)
    for i, prompt in enumerate(asked):
        loop.submit(Request(id="it", prompt=prompt, max_tokens=3))
        assert drain(loop)["it"].token_ids == alone[i]
    assert loop.num_reused == 12 + 9


def test_generating_between_two_steps_leaves_served_requests_right() -> None:
    model: Any = tiny_model("olmoe")
    alone, other = greedy(model, PROMPT, 4), greedy(model, OTHER, 3)
    _, loop = serving(model, prefix_reuse=True)
    for request in choices(2):
        loop.submit(request)
    served: dict[str, Any] = {}
    for _ in range(2):
        served |= {result.id: result for result in loop.step()}
        assert greedy(model, OTHER, 3) == other
    served |= drain(loop)
    assert {result.token_ids[: len(alone)] for result in served.values()} == {alone}


def test_a_second_loop_of_one_storage_is_refused_by_name_until_the_first_has_ended() -> None:
    model: Any = tiny_model("olmoe")
    alone, other = greedy(model, PROMPT, 3), greedy(model, OTHER, 3)
    engine, loop = serving(model)
    second = ServingLoop(engine, None, ServeSettings(**SMALL))
    loop.submit(Request(id="it", prompt=PROMPT, max_tokens=3))
    loop.step()
    second.submit(Request(id="it", prompt=OTHER, max_tokens=3))
    refused = drain(second)["it"]
    assert refused.finish == "error" and "in use by another serve" in refused.error
    assert drain(loop)["it"].token_ids == alone
    second.submit(Request(id="it", prompt=OTHER, max_tokens=3))
    assert drain(second)["it"].token_ids == other
    engine.check_integrity()


def test_a_captured_step_that_fails_ends_one_request_only() -> None:
    model: Any = tiny_model("olmoe")
    alone = greedy(model, PROMPT, 4)
    engine, loop = serving(model)
    poison(loop)
    loop.submit(Request(id="bad", prompt=OTHER, max_tokens=2, label=POISON))
    loop.submit(Request(id="good", prompt=PROMPT, max_tokens=4))
    served = drain(loop)
    assert served["bad"].error == "RuntimeError: out of memory"
    assert served["good"].token_ids == alone
    engine.check_integrity()
