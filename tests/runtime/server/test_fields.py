"""Fields of requests: what stock clients send is understood, and nothing is pretended."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx2 as httpx
import openai
import pytest

from runtime.engine.engine import Engine
from runtime.server.errors import Refused
from runtime.server.protocol import fields
from runtime.server.protocol.chat import ChatBody
from runtime.server.protocol.completion import CompletionBody
from tests.helpers.serving import greedy
from tests.helpers.tiny import tiny_tokenizer

HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 6, "temperature": 0}

PAYLOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "vllm bench serve, openai": (
        "completions",
        {
            "model": "tiny",
            "prompt": "abc",
            "repetition_penalty": 1.0,
            "max_tokens": 4,
            "min_tokens": 4,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "temperature": 0.0,
            "top_p": None,
            "top_k": None,
        },
    ),
    "vllm bench serve, openai-chat": (
        "chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_completion_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
    ),
    "guidellm": (
        "chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "model": "tiny",
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "max_completion_tokens": 4,
            "stop": None,
            "ignore_eos": True,
        },
    ),
    "ChatOpenAI": (
        "chat/completions",
        {
            "messages": [
                {"role": "system", "content": "be brief", "name": "operator"},
                {"role": "user", "content": "hi", "name": "ann"},
            ],
            "model": "tiny",
            "frequency_penalty": None,
            "presence_penalty": 0.1,
            "logit_bias": None,
            "n": 1,
            "stream": False,
            "temperature": 0.7,
            "parallel_tool_calls": None,
            "response_format": {"type": "text"},
            "max_completion_tokens": 4,
            "service_tier": "auto",
            "store": False,
            "metadata": {"run": "1"},
            "modalities": ["text"],
        },
    ),
    "OpenAI of LangChain": (
        "completions",
        {
            "model": "tiny",
            "prompt": ["abc", "q"],
            "temperature": 0.7,
            "top_p": 1,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "n": 1,
            "best_of": 1,
            "logit_bias": {},
            "max_tokens": 4,
            "seed": None,
            "logprobs": None,
            "suffix": None,
            "user": "ann",
        },
    ),
    "lm-evaluation-harness, text": (
        "completions",
        {
            "model": "tiny",
            "prompt": ["abc", "q"],
            "max_tokens": 4,
            "temperature": 0,
            "stop": ["\n\n", "Question:"],
            "seed": 1234,
        },
    ),
    "lm-evaluation-harness, chats": (
        "chat/completions",
        {
            "messages": [{"role": "user", "content": "hi", "type": "text"}],
            "model": "tiny",
            "max_tokens": 4,
            "temperature": 0,
            "stop": ["\n"],
            "seed": 1234,
        },
    ),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_what_a_stock_client_sends_is_answered(address: str, name: str) -> None:
    path, payload = PAYLOADS[name]
    answer = httpx.post(f"{address}/v1/{path}", json=payload)
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers
    if payload.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"completion_tokens": 4' in answer.text


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_null_is_the_default_of_every_field(kind: Any) -> None:
    required = {"prompt": "a"} if kind is CompletionBody else {"messages": HI}
    body = kind.of(required)
    nulls = {name: None for name in kind.model_fields if name not in required}
    nulls |= dict.fromkeys(fields.UNSUPPORTED)
    assert kind.of(required | nulls) == body


@pytest.mark.parametrize("name", fields.UNSUPPORTED)
def test_what_is_known_but_not_supported_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    neutral, _ = fields.UNSUPPORTED[name]
    for value in (*neutral, None, *([] if True in neutral else [False, [], {}])):
        ChatBody.of({"messages": HI, name: value})
    with pytest.raises(Refused, match=name) as refused:
        ChatBody.of({"messages": HI, name: "something"})
    assert (refused.value.status, refused.value.param) == (400, name)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"best_of": 4}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"echo": True}, "echo"),
        ({"tool_choice": "required"}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"chat_template_kwargs": {"tokenize": True}}, "messages"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
    ],
    ids=str,
)
def test_a_chat_that_asks_for_more_is_refused_by_name(
    address: str, asked: dict[str, Any], param: str
) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": HI} | asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_an_unknown_field_is_ignored_and_reported(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    fields._reported.clear()
    asked = GREEDY | {"frobnicate": 1, "x\ny": 2}
    with caplog.at_level(logging.WARNING, logger=fields.__name__):
        answers = [httpx.post(f"{address}/v1/completions", json=asked) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].headers["x-ignored-fields"] == "frobnicate"
    assert sum("frobnicate" in record.getMessage() for record in caplog.records) == 1
    assert not any("\n" in record.getMessage() for record in caplog.records)


def test_variables_that_a_template_does_not_read_are_reported(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    fields._reported.clear()
    asked = {"messages": HI, "max_tokens": 1, "chat_template_kwargs": {"enable_thinking": False}}
    with caplog.at_level(logging.WARNING, logger=fields.__name__):
        assert httpx.post(f"{address}/v1/chat/completions", json=asked).status_code == 200
    assert "chat_template_kwargs.enable_thinking" in caplog.text


def test_a_request_need_not_name_the_model(address: str) -> None:
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert answer.json()["model"] == "tiny"


# ---------------------------------------------------------------------- sampling


def test_rules_of_sampling_reach_the_model(client: openai.OpenAI, engine: Engine) -> None:
    ids = tiny_tokenizer()("abc").input_ids
    first, *_ = tokens = greedy(engine.model, ids, 6)
    plain = client.completions.create(**GREEDY).choices[0].text
    assert plain == tiny_tokenizer().decode(list(tokens), skip_special_tokens=True)
    for rules in (
        {"logit_bias": {str(first): -100}},
        {"extra_body": {"repetition_penalty": 100.0}},
        {"extra_body": {"stop_token_ids": [first]}},
    ):
        assert client.completions.create(**GREEDY, **rules).choices[0].text != plain
    likeliest = client.completions.create(
        **(GREEDY | {"temperature": 2, "seed": 3}), extra_body={"min_p": 1.0, "top_k": -1}
    )
    assert likeliest.choices[0].text == plain


def test_penalties_reach_the_model(client: openai.OpenAI) -> None:
    asked = GREEDY | {"max_tokens": 60, "logit_bias": {"70": 60.0}}
    repeated = client.completions.create(**asked).choices[0].text
    for penalty in ("presence_penalty", "frequency_penalty"):
        asked_too = asked | {penalty: 2.0, "logit_bias": {"70": 1.0}}
        assert client.completions.create(**asked_too).choices[0].text != repeated


def test_min_tokens_come_before_the_end(client: openai.OpenAI) -> None:
    asked = GREEDY | {"logit_bias": {"1": 100}}
    assert client.completions.create(**asked).usage.completion_tokens == 1
    longer = client.completions.create(**asked, extra_body={"min_tokens": 4})
    assert longer.usage is not None and longer.usage.completion_tokens == 5


def test_a_stop_string_is_part_of_the_text_where_that_is_asked_for(client: openai.OpenAI) -> None:
    whole = client.completions.create(**GREEDY).choices[0].text
    stop = whole[1:3]
    cut = client.completions.create(
        **GREEDY, stop=stop, extra_body={"include_stop_str_in_output": True}
    )
    assert cut.choices[0].text == whole[: whole.index(stop) + len(stop)]


def test_an_answer_in_json_fits_its_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    said = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
        max_tokens=60,
    )
    content = said.choices[0].message.content
    assert content is not None and json.loads(content)["colour"] in ("red", "green")
    assert said.choices[0].finish_reason == "stop"


def test_a_chat_without_a_limit_may_fill_the_context(client: openai.OpenAI) -> None:
    said = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], extra_body={"ignore_eos": True}
    )
    assert said.usage is not None and said.usage.total_tokens == 200
    assert said.choices[0].finish_reason == "length"
