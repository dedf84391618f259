"""Log-probabilities of prompts and of generated tokens: the model's own, whole or in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from runtime.engine.engine import Engine
from runtime.serving.request import Logprob, Request
from runtime.serving.sampling.logprobs import PromptScores, logprob_of
from runtime.serving.sequence import MOST_SCORED
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers.serving import SMALL, by_id, offloaded, prompts
from tests.helpers.tiny import tiny_model

PROMPT = prompts(4, 1, longest=20)[0] + [9, 9, 200, 13, 44]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with offloaded(tiny_model("olmoe")) as engine:
        yield engine


def reference(model: Any, prompt: list[int]) -> list[float]:
    """The log-probability of each token but the first, by one forward pass of the model."""
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    return [float(logprobs_TV[i, token]) for i, token in enumerate(prompt[1:])]


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_a_prompts_log_probabilities_are_those_of_one_forward_pass_in_any_chunks(
    engine: Engine, chunk: int, max_tokens: int
) -> None:
    others = [Request(id=str(i), prompt=p, max_tokens=5) for i, p in enumerate(prompts(6, 4))]
    asked = Request(id="it", prompt=PROMPT, max_tokens=max_tokens, prompt_logprobs=2)
    options = SMALL | {"chunk": chunk}
    results = by_id(engine.serve([*others[:2], asked, *others[2:]], **options))
    first, *rest = results["it"].prompt_logprobs
    assert first is None
    assert [one.token_id for one in rest if one] == PROMPT[1:]
    expected = reference(engine.model, PROMPT)
    assert [one.logprob for one in rest if one] == pytest.approx(expected, abs=1e-4)
    without = by_id(engine.serve([*others], **SMALL))
    assert all(results[r.id].token_ids == without[r.id].token_ids for r in others)
    assert len(results["it"].token_ids) == max_tokens


def test_a_long_prompt_is_scored_in_pieces_whose_logits_are_few() -> None:
    with offloaded(tiny_model("olmoe")) as engine:
        loop = ServingLoop(engine, None, ServeSettings(context=256, chunk=256))
        prompt = [3 + i % 250 for i in range(200)]
        loop.submit(Request(id="it", prompt=prompt, max_tokens=0, prompt_logprobs=0))
        assert loop.step() == []
        assert loop.active[0].num_cached == MOST_SCORED
        (result,) = loop.step()
        got = [one.logprob for one in result.prompt_logprobs if one is not None]
        assert got == pytest.approx(reference(engine.model, prompt), abs=1e-4)


def test_a_request_for_no_tokens_ends_after_its_prompt(engine: Engine) -> None:
    loop = ServingLoop(engine, None, ServeSettings(**SMALL))
    loop.submit(Request(id="it", prompt=[5], max_tokens=0, prompt_logprobs=1))
    (result,) = loop.step()
    assert (result.finish, result.token_ids, result.text) == ("length", (), "")
    assert result.prompt_logprobs == (None,)
    assert loop.num_generated == 0 and loop.is_idle


def test_a_step_that_runs_again_scores_a_prompt_once() -> None:
    logits_TV = torch.randn(4, 20)
    once, twice = PromptScores([5, 6, 7, 8], 1), PromptScores([5, 6, 7, 8], 1)
    for start, rows in ((0, logits_TV[:2]), (2, logits_TV[2:])):
        once.add(start, rows)
        for _ in range(2):
            twice.add(start, rows)
    twice.check()
    assert once.so_far == twice.so_far and len(once.so_far) == 4


def test_prompt_logprobs_are_absent_unless_asked_for(engine: Engine) -> None:
    result = by_id(engine.serve([Request(id="it", prompt=PROMPT, max_tokens=2)], **SMALL))["it"]
    assert result.prompt_logprobs == ()


def test_a_prompt_whose_logits_are_nan_ends_alone_and_says_so() -> None:
    model: Any = tiny_model("olmoe")
    with offloaded(model) as engine, torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.nan
        asked = [
            Request(id=str(i), prompt=[i, 5], max_tokens=0, prompt_logprobs=1) for i in (2, 3, 4)
        ]
        results = by_id(engine.serve(asked, **SMALL))
    assert results["3"].finish == "error" and "NaN" in results["3"].error
    assert results["2"].finish == results["4"].finish == "length"


# ---------------------------------------------------------------------- the likeliest ones


def test_log_probabilities_are_of_the_models_distribution_whatever_the_rules(
    engine: Engine,
) -> None:
    rules: dict[str, Any] = {"temperature": 3.0, "logit_bias": {7: 90.0}, "presence_penalty": 2.0}
    asked = Request(
        id="it", prompt=PROMPT, max_tokens=3, logprobs=1, ignore_eos=True, seed=1, **rules
    )
    result = by_id(engine.serve([asked], **SMALL))["it"]
    assert result.token_ids[0] == 7
    expected = reference(engine.model, [*PROMPT, *result.token_ids])[-3:]
    assert [one.logprob for one in result.logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("token", "count", "top"),
    [(2, 0, []), (2, 1, [2]), (0, 1, [2, 0]), (0, 2, [2, 1, 0]), (1, 9, [2, 1, 0])],
)  # fmt: skip
def test_the_token_itself_is_among_the_likeliest_or_after_them(
    token: int, count: int, top: list[int]
) -> None:
    logits_V = torch.tensor([0.0, 1.0, 2.0])
    found = logprob_of(token, logits_V, count)
    assert [one for one, _ in found.top] == top
    assert all(value == float(logits_V.log_softmax(-1)[one]) for one, value in found.top)
    assert found == Logprob(token, float(logits_V.log_softmax(-1)[token]), found.top)
