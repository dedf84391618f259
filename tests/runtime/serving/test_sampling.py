"""Sampling: what each rule does to the logits, in any company, and numbers of every size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.engine.engine import Engine
from runtime.engine.next_tokens import NOT_FINITE, NextTokens
from runtime.serving.request import Request
from runtime.serving.sampling.logprobs import logprob_of
from runtime.serving.sampling.sampler import Sampler
from tests.helpers.serving import SMALL, by_id, offloaded, prompts, sequence
from tests.helpers.tiny import EOS, tiny_model

VOCAB = 40
PROMPT = [5, 6, 7, 5]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with offloaded(tiny_model("olmoe")) as engine:
        yield engine


def served(engine: Engine, **options: Any) -> tuple[int, ...]:
    asked = Request(id="it", prompt=PROMPT, **({"max_tokens": 20, "ignore_eos": True} | options))
    result = by_id(engine.serve([asked], **SMALL))["it"]
    assert result.finish != "error", result.error
    return result.token_ids


def logits_of(seed: int, count: int = 1, spread: float = 4.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, VOCAB, generator=random) * spread


def draws(
    request: Request, logits_NV: Tensor, prompt_ids: Sequence[int] = (), **options: Any
) -> list[int]:
    sampler = Sampler(request, prompt_ids, **options)
    return [sampler.choose(int(logits_V.argmax()), logits_V) for logits_V in logits_NV]


def test_logits_are_read_only_for_who_does_not_take_the_likeliest_token() -> None:
    unread = NextTokens([7, -1], torch.empty(0, VOCAB))
    plain = sequence(0, max_tokens=2)
    assert plain.accept(unread, 0) is None
    assert plain.token_ids[-1] == 7
    for options in ({"temperature": 1.0}, {"logit_bias": {3: 1.0}}, {"logprobs": 1}):
        with pytest.raises(IndexError):
            sequence(0, **options).accept(unread, 0)
    logits_NV = torch.full((2, VOCAB), math.nan)
    with pytest.raises(FloatingPointError, match=NOT_FINITE):
        plain.accept(unread._replace(logits_NV=logits_NV), 1)


# ---------------------------------------------------------------------- against references


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"repetition_penalty": 0.6}, {"repetition_penalty": 0.6}),
        ({"logit_bias": {9: 5.0, 31: -7}}, {"sequence_bias": [[[9], 5.0], [[31], -7.0]]}),
        (
            {"repetition_penalty": 1.3, "logit_bias": {40: 3.5}},
            {"repetition_penalty": 1.3, "sequence_bias": [[[40], 3.5]]},
        ),
    ],
)
def test_greedy_tokens_are_those_of_generate_with_the_same_rules(
    engine: Engine, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    model: Any = engine.model
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **theirs
    )
    expected = tuple(out[0, len(PROMPT) :].tolist())
    assert served(engine, max_tokens=12, ignore_eos=False, **ours) == expected
    assert served(engine, max_tokens=12) != expected


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=12),
    repetition=st.sampled_from([0.5, 1.0, 1.3, 4.0]),
    presence=st.sampled_from([-2.0, 0.0, 0.7, 2.0]),
    frequency=st.sampled_from([-0.5, 0.0, 1.1]),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.integers(-9, 9), max_size=4),
    minimum=st.integers(0, 6),
)
def test_greedy_tokens_are_the_likeliest_by_the_rules_spelled_out(
    seed: int, prompt: list[int], repetition: float, presence: float, frequency: float,
    bias: dict[int, int], minimum: int,
) -> None:  # fmt: skip
    request = Request(
        prompt=prompt, max_tokens=8, min_tokens=minimum, logit_bias=bias,
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency,
    )  # fmt: skip
    logits_NV, ends = logits_of(seed, 8, spread=2.0), {1, 30}
    generated: list[int] = []
    for logits_V in logits_NV.tolist():
        for token, logit in enumerate(logits_V):
            if len(generated) < minimum and token in ends:
                logit = -math.inf
            logit += bias.get(token, 0)
            if token in prompt + generated:
                logit = logit / repetition if logit > 0 else logit * repetition
            logit -= frequency * generated.count(token) + presence * (token in generated)
            logits_V[token] = logit
        generated.append(int(np.argmax(logits_V)))
    assert draws(request, logits_NV, prompt, end_ids=ends) == generated


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.9, "top_p": 0.6},
        {"temperature": 2.0, "min_p": 0.2},
        {"temperature": 1.5, "min_p": 0.05, "top_k": 9, "top_p": 0.8},
    ],
)
def test_draws_are_those_of_the_warpers_of_transformers(options: dict[str, Any]) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options["temperature"])])
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    random, expected, logits_NV = torch.Generator().manual_seed(3), [], logits_of(1, 60)
    for logits_V in logits_NV:
        scores: Any = warpers(torch.empty(1, 0, dtype=torch.int64), logits_V[None])  # type: ignore[arg-type]
        expected.append(int(torch.multinomial(scores.softmax(-1)[0], 1, generator=random)))
    assert draws(Request(prompt=[1], seed=3, **options), logits_NV) == expected


def test_presence_and_frequency_count_generated_tokens_only(engine: Engine) -> None:
    plain = served(engine)
    assert len(set(served(engine, frequency_penalty=2.0, presence_penalty=2.0))) > len(set(plain))
    first = served(engine, max_tokens=1)
    assert served(engine, max_tokens=1, presence_penalty=2.0, frequency_penalty=2.0) == first


def test_the_end_of_sequence_token_waits_for_the_minimum_of_tokens(engine: Engine) -> None:
    options = {"ignore_eos": False, "logit_bias": {EOS: 100, 9: 60}}
    assert served(engine, **options) == (EOS,)
    assert served(engine, min_tokens=3, **options) == (9, 9, 9, EOS)


# ---------------------------------------------------------------------- any company


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.8, 1.5]),
        "top_k": st.sampled_from([0, -1, 7]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.4]),
        "logit_bias": st.sampled_from([{}, {3: 4.0}]),
        "logprobs": st.sampled_from([None, 2]),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=100, deadline=None)
@given(several=st.lists(OPTIONS, min_size=2, max_size=4), seed=st.integers(0, 99))
def test_a_row_is_sampled_by_itself_bit_for_bit(several: list[dict[str, Any]], seed: int) -> None:
    asked = [Request(prompt=PROMPT, max_tokens=6, **options) for options in several]
    logits_NTV = torch.stack([logits_of(seed + i, 6) for i in range(len(asked))])
    alone = [draws(r, rows.clone(), PROMPT) for r, rows in zip(asked, logits_NTV, strict=True)]
    samplers = [Sampler(request, PROMPT) for request in asked]
    for step in range(6):
        together_NV = logits_NTV[:, step].clone()
        for i, sampler in enumerate(samplers):
            token = sampler.choose(int(together_NV[i].argmax()), together_NV[i])
            assert token == alone[i][step]
            row = logits_NTV[i, step].clone()
            assert logprob_of(token, together_NV[i], 3) == logprob_of(token, row, 3)
        assert torch.equal(together_NV, logits_NTV[:, step])


@settings(max_examples=6, deadline=None)
@given(several=st.lists(OPTIONS, min_size=2, max_size=4))
def test_served_together_requests_get_the_tokens_they_get_alone(
    engine: Engine, several: list[dict[str, Any]]
) -> None:
    asked = [
        Request(id=str(i), prompt=prompt, max_tokens=6, **options)
        for i, (prompt, options) in enumerate(zip(prompts(2, 4), several, strict=False))
    ]
    together = by_id(engine.serve(asked, **SMALL))
    for request in asked:
        alone = by_id(engine.serve([request], **SMALL))[request.id]
        assert together[request.id].token_ids == alone.token_ids
        assert together[request.id].finish != "error"


# ---------------------------------------------------------------------- edges of numbers


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 5e-324, 1e-300])
def test_a_tiny_temperature_takes_the_likeliest_token(engine: Engine, temperature: float) -> None:
    assert served(engine, temperature=temperature, seed=1) == served(engine)


@pytest.mark.parametrize("temperature", [1e30, 1e308])
def test_a_huge_temperature_takes_every_token_alike(temperature: float) -> None:
    request = Request(prompt=[1], temperature=temperature, seed=1)
    counts = torch.tensor(draws(request, logits_of(0).expand(4000, -1))).bincount(minlength=VOCAB)
    assert counts.min() > 50 and counts.max() < 170


@pytest.mark.parametrize("options", [{"top_p": 1e-40}, {"top_k": 1}, {"min_p": 1.0}])
def test_the_narrowest_choice_is_the_likeliest_token(options: dict[str, Any]) -> None:
    logits_NV = logits_of(4, 50)
    request = Request(prompt=[1], temperature=1.0, seed=1, **options)
    assert draws(request, logits_NV) == logits_NV.argmax(-1).tolist()


@pytest.mark.parametrize("top_k", [-1, 0, VOCAB, 2**70])
def test_as_many_tokens_as_there_are_is_all(top_k: int) -> None:
    logits_NV = logits_of(4, 50)
    plain = draws(Request(prompt=[1], temperature=1.0, seed=1), logits_NV)
    assert draws(Request(prompt=[1], temperature=1.0, seed=1, top_k=top_k), logits_NV) == plain


@pytest.mark.parametrize("seed", [-1, 2**70, np.int64(5), torch.tensor(5)])
def test_any_whole_number_is_a_seed(seed: Any) -> None:
    request = Request(prompt=[1], temperature=1.0, seed=seed)
    assert draws(request, logits_of(4, 20)) == draws(request, logits_of(4, 20))


@pytest.mark.parametrize(
    ("field", "value", "taken"),
    [
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.array(0.5), 0.5),
        ("temperature", torch.tensor(0.5), 0.5),
        ("temperature", torch.tensor(2), 2.0),
        ("temperature", Fraction(1, 2), 0.5),
        ("top_p", np.float64(0.5), 0.5),
        ("max_tokens", np.int32(3), 3),
        ("max_tokens", torch.tensor(3), 3),
        ("top_k", -1, 0),
        ("logprobs", np.int64(2), 2),
        ("ignore_eos", np.True_, True),
        ("stop", None, ()),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop_token_ids", torch.tensor([3, 4]), (3, 4)),
        ("stop_token_ids", None, ()),
        ("stop_token_ids", [np.int64(3)], (3,)),
        ("logit_bias", {"5": 1, np.int64(6): np.float32(2)}, {5: 1.0, 6: 2.0}),
        ("logit_bias", None, {}),
        ("json_schema", False, None),
    ],
)
def test_numbers_of_any_library_are_taken(field: str, value: Any, taken: Any) -> None:
    got = getattr(Request(prompt=[1], **{field: value}), field)
    assert got == taken and type(got) is type(taken)


class Unspeakable:
    """A value that cannot even be written."""

    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 10**400), ("temperature", 10**5000), ("top_k", -(10**5000)),
        ("temperature", math.inf), ("temperature", -0.1),
        ("temperature", torch.tensor([0.5, 0.6])), ("temperature", torch.tensor(True)),
        ("temperature", np.float32("nan")), ("temperature", 1j), ("top_p", 0), ("top_p", 1.1),
        ("min_p", -0.1), ("min_p", 1.5), ("min_p", math.nan), ("min_p", True),
        ("presence_penalty", 2.1), ("presence_penalty", "1"), ("frequency_penalty", -2.5),
        ("frequency_penalty", None), ("repetition_penalty", 0), ("repetition_penalty", -1.0),
        ("repetition_penalty", math.nan), ("repetition_penalty", math.inf), ("min_tokens", -1),
        ("min_tokens", 129), ("top_k", -2), ("max_tokens", 0), ("max_tokens", -3),
        ("max_tokens", np.float64(3)), ("prompt_logprobs", -1), ("prompt_logprobs", True),
        ("logprobs", -1), ("logit_bias", {5: 101}), ("logit_bias", {5: math.nan}),
        ("logit_bias", {-1: 1}), ("logit_bias", {"x": 1}), ("logit_bias", {"5": 1, 5: 2}),
        ("logit_bias", [1]), ("logit_bias", {True: 1}), ("stop_token_ids", 5),
        ("stop_token_ids", "5"), ("stop_token_ids", [-1]), ("stop_token_ids", [1.5]),
        ("ignore_eos", "no"), ("ignore_eos", 0), ("include_stop_str_in_output", None),
        ("json_schema", "{}"), ("json_schema", 1), ("json_schema", {"enum": [{1, 2}]}),
        ("json_schema", {"enum": [math.nan]}), ("stop", ["\ud800"]), ("stop", {"a"}), ("label", 5),
        ("id", 5), ("id", Unspeakable()), ("temperature", Unspeakable()), ("on_token", "print"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_value_that_means_nothing_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Request(prompt=[1], **{field: value})


# ---------------------------------------------------------------------- nothing to choose from


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_no_token_is_left_for_ends_alone_and_says_so(
    engine: Engine, temperature: float
) -> None:
    everything = range(256)
    bad = Request(
        id="bad", prompt=PROMPT, max_tokens=4, min_tokens=2, stop_token_ids=everything,
        temperature=temperature,
    )  # fmt: skip
    good = Request(id="good", prompt=PROMPT, max_tokens=4, ignore_eos=True)
    results = by_id(engine.serve([bad, good], **SMALL))
    assert results["bad"].finish == "error" and "no token can follow" in results["bad"].error
    assert results["good"].token_ids == served(engine, max_tokens=4)


def test_a_penalty_that_overflows_ends_its_own_request_and_says_so(engine: Engine) -> None:
    bad = Request(id="bad", prompt=PROMPT, max_tokens=9, repetition_penalty=1e-300, temperature=1.0)
    result = by_id(engine.serve([bad], **SMALL))["bad"]
    assert result.finish == "error" and "repetition_penalty" in result.error


@pytest.mark.parametrize(
    ("field", "value"), [("logit_bias", {256: 1.0}), ("stop_token_ids", [7, 256])]
)
def test_a_token_outside_the_vocabulary_is_refused(engine: Engine, field: str, value: Any) -> None:
    bad = Request(id="bad", prompt=PROMPT, max_tokens=9, **{field: value})
    result = by_id(engine.serve([bad], **SMALL))["bad"]
    assert result.finish == "error" and f"{field} has the token id 256" in result.error
