"""Structured output: what comes out is JSON that fits, and what cannot be followed is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.engine.engine import Engine
from runtime.serving.request import Request, Result
from tests.helpers.serving import SMALL, by_id, offloaded
from tests.helpers.tiny import EOS, tiny_model, tiny_tokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

TOKENIZER = tiny_tokenizer()
COMPACT = {TOKENIZER(space).input_ids[0]: -20.0 for space in " \n\t"}
"""A bias against the indentation that a random model likes as much as anything."""
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "either": {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"const": "é漢"}]},
    "numbers": {
        "type": "array",
        "items": {"type": "number", "minimum": 1, "maximum": 3},
        "minItems": 2,
        "maxItems": 3,
    },
    "recursive": {
        "$defs": {"node": {"type": "object", "properties": {"n": {"$ref": "#/$defs/node"}},
                           "additionalProperties": False}},
        "$ref": "#/$defs/node",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with offloaded(tiny_model("olmoe")) as engine:
        yield engine


def ask(engine: Engine, *several: dict[str, Any], **options: Any) -> dict[str, Result]:
    common: dict[str, Any] = {"prompt": "a", "max_tokens": 250, "logit_bias": COMPACT}
    asked = [Request(id=str(i), **(common | one)) for i, one in enumerate(several)]
    settings = SMALL | {"context": 256} | options
    return by_id(engine.serve(asked, **({"tokenizer": TOKENIZER} | settings)))


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_random_models_text_is_json_that_fits_the_schema(engine: Engine, name: str) -> None:
    schema = SCHEMAS[name]
    several = [{"json_schema": schema, "temperature": 1.0, "seed": seed} for seed in range(6)]
    results = ask(engine, *several, {"json_schema": schema}).values()
    assert {result.finish for result in results} <= {"stop", "length"}
    ended = [json.loads(result.text) for result in results if result.finish == "stop"]
    for value in ended:
        jsonschema.validate(value, schema)
    assert len(ended) >= 3


def test_any_object_will_do_where_the_schema_is_true(engine: Engine) -> None:
    closing = COMPACT | {TOKENIZER("}").input_ids[0]: 60.0}
    several = [
        {"json_schema": True, "temperature": 1.0, "seed": seed, "logit_bias": closing}
        for seed in range(3)
    ]
    for result in ask(engine, *several).values():
        assert result.finish == "stop" and isinstance(json.loads(result.text), dict)


@pytest.mark.parametrize("value", ["yes", 12, None, True, {"a": [1, "b"]}, '"\\\n', "🙂"])
def test_a_constant_comes_out_exactly(engine: Engine, value: Any) -> None:
    several = [{"json_schema": {"const": value}}, {"json_schema": {"enum": [value]}}]
    for result in ask(engine, *several).values():
        assert result.finish == "stop" and json.loads(result.text) == value


def test_whitespace_does_not_go_on_for_ever(engine: Engine) -> None:
    spaces = dict.fromkeys(COMPACT, 60.0)
    schema = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}
    (result,) = ask(engine, {"json_schema": schema, "logit_bias": spaces}).values()
    assert result.finish == "stop" and json.loads(result.text) == [1, 1]
    assert len(result.text) > 30


def test_the_choice_within_an_enum_is_the_models(engine: Engine) -> None:
    schema = {"enum": ["one", "two", "three"]}
    several = [{"json_schema": schema, "temperature": 5.0, "seed": seed} for seed in range(12)]
    found = {json.loads(result.text) for result in ask(engine, *several).values()}
    assert len(found) > 1 and found <= {"one", "two", "three"}


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_eos": True},
        {"repetition_penalty": 3.0},
        {"logit_bias": {EOS: -100.0} | COMPACT},
        {"logprobs": 2},
    ],
)
def test_a_json_ends_where_it_is_complete_whatever_else_is_asked(
    engine: Engine, options: dict[str, Any]
) -> None:
    (result,) = ask(engine, {"json_schema": PERSON} | options).values()
    assert result.finish == "stop"
    jsonschema.validate(json.loads(result.text), PERSON)


def test_an_end_token_after_a_json_is_no_part_of_the_text(engine: Engine) -> None:
    digits = {"json_schema": {"type": "integer"}, "logit_bias": {EOS: 30.0}}
    for result in ask(engine, digits, digits | {"ignore_eos": True}).values():
        assert result.finish == "stop" and result.token_ids[-1] == EOS
        assert isinstance(json.loads(result.text), int)


def test_it_is_the_same_in_any_company(engine: Engine) -> None:
    one = {"json_schema": PERSON, "temperature": 1.0, "seed": 4}
    alone = ask(engine, one)["0"]
    together = ask(engine, one, {"prompt": "zz", "max_tokens": 30}, {"json_schema": True})["0"]
    assert together.token_ids == alone.token_ids and together.text == alone.text


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "nonsense"}, "nonsense"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "format": "zzz"}, "zzz"),
    ],
)
def test_a_schema_that_cannot_be_followed_ends_its_own_request_and_says_why(
    engine: Engine, schema: dict[str, Any], reason: str
) -> None:
    results = ask(engine, {"json_schema": schema}, {"max_tokens": 3, "ignore_eos": True})
    assert results["0"].finish == "error"
    assert "json_schema cannot be followed" in results["0"].error
    assert reason in results["0"].error
    assert results["1"].finish == "length"


def test_it_needs_a_tokenizer(engine: Engine) -> None:
    (result,) = ask(engine, {"json_schema": True, "prompt": [5]}, tokenizer=None).values()
    assert result.finish == "error" and "tokenizer=" in result.error


def test_without_the_library_one_error_says_what_to_install(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    results = ask(engine, {"json_schema": True}, {"max_tokens": 2, "ignore_eos": True})
    assert results["0"].finish == "error"
    assert "pip install 'moe-expertflow[serve]'" in results["0"].error
    assert results["1"].finish == "length"


def test_a_minimum_of_tokens_does_not_go_with_a_schema() -> None:
    with pytest.raises(ValueError, match="min_tokens does not go with json_schema"):
        Request(prompt=[1], json_schema=True, min_tokens=2)
