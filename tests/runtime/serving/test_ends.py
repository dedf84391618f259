"""The ends of served requests: stop strings, stop tokens, minimum of tokens, and the text kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from runtime.engine.engine import Engine
from runtime.serving.request import Delta, Request, Result
from tests.helpers.serving import SMALL, by_id, offloaded
from tests.helpers.tiny import EOS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with offloaded(tiny_model("olmoe")) as engine:
        yield engine


def ask(engine: Engine, **options: Any) -> Result:
    """The end of one request that writes As, Bs and Cs of its own accord."""
    pieces: list[Delta] = []
    asked = Request(
        id="it", prompt="x", **({"max_tokens": 30} | options), on_token=pieces.append,
        logit_bias=dict.fromkeys(TOKENIZER("ABC").input_ids, 50.0), presence_penalty=1.0,
        frequency_penalty=2.0, ignore_eos=True,
    )  # fmt: skip
    result = by_id(engine.serve([asked], tokenizer=TOKENIZER, **SMALL))["it"]
    assert "".join(piece.text for piece in pieces) == result.text
    return result


@pytest.fixture(scope="module")
def whole(engine: Engine) -> str:
    text = ask(engine).text
    assert len(text) == 30 and set(text) == set("ABC")
    return text


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("minimum", [0, 1, 5, 9])
def test_a_stop_string_counts_after_the_minimum_of_tokens(
    engine: Engine, whole: str, include: bool, minimum: int
) -> None:
    result = ask(engine, stop="B", min_tokens=minimum, include_stop_str_in_output=include)
    at = whole.index("B", minimum)
    assert result.finish == "stop"
    assert result.text == whole[: at + 1 if include else at]
    assert len(result.token_ids) == at + 1


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_ends_the_text_before_it_or_with_it(
    engine: Engine, whole: str, include: bool
) -> None:
    (token,) = TOKENIZER("B").input_ids
    result = ask(engine, stop_token_ids=[token], include_stop_str_in_output=include)
    assert result.finish == "stop" and result.token_ids[-1] == token
    assert result.text == whole[: whole.index("B") + include]


def test_a_stop_token_is_not_chosen_before_the_minimum_of_tokens(engine: Engine) -> None:
    (token,) = TOKENIZER("B").input_ids
    result = ask(engine, stop_token_ids=[token], min_tokens=6)
    assert result.finish == "stop" and "B" not in result.text and len(result.text) >= 6


def test_a_special_token_named_as_a_stop_string_ends_the_request(engine: Engine) -> None:
    asked = Request(
        id="it", prompt="x", max_tokens=9, logit_bias={EOS: 100.0}, ignore_eos=True,
        stop=TOKENIZER.eos_token,
    )  # fmt: skip
    result = by_id(engine.serve([asked], tokenizer=TOKENIZER, **SMALL))["it"]
    assert (result.finish, result.token_ids, result.text) == ("stop", (EOS,), "")


def test_a_stop_string_that_no_text_can_hold_is_refused(engine: Engine) -> None:
    result = ask(engine, stop=f"x{TOKENIZER.eos_token}")
    assert result.finish == "error" and "special token" in result.error


def test_a_callback_that_raises_ends_its_own_request_at_once(engine: Engine) -> None:
    calls = []

    def fail(delta: Delta) -> None:
        calls.append(delta)
        raise KeyError("gone")

    good = Request(id="good", prompt="x", max_tokens=5, ignore_eos=True)
    bad = Request(id="bad", prompt="x", max_tokens=5, on_token=fail)
    results = by_id(engine.serve([bad, good], tokenizer=TOKENIZER, **SMALL))
    assert results["bad"].finish == "error" and results["bad"].error == "KeyError: 'gone'"
    assert len(calls) == 1 and len(results["good"].token_ids) == 5
