"""Calls of tools: out of a model's text whole or streamed, and required by a grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from runtime.engine.engine import Engine
from runtime.server.errors import Refused
from runtime.server.protocol.chat import ChatBody
from runtime.server.protocol.chat_answer import ChatAnswer
from runtime.server.protocol.token_text import TokenText
from runtime.server.protocol.tool_calls import Read, Thought, format_of, reader_of
from runtime.server.protocol.tool_choice import Tool, schema_of_calls
from runtime.server.protocol.tool_formats import Call
from runtime.serving.request import Delta, Result
from tests.helpers.http_server import connect, running
from tests.helpers.tiny import tiny_tokenizer

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} as <tool_call>{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}{{ '\n' }}{% endfor %}assistant:"
)
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMAS = {"weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
ROME = Call("weather", '{"city": "Rome"}')
BOTH = Call("weather", '{"city": "7", "days": 7}')


def read(form: str, text: str, size: int) -> Read:
    """What comes of a text that arrives `size` characters at a time, neighbouring texts joined."""
    reader = reader_of(None, form, SCHEMAS)
    found: Read = []
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    for item in [item for piece in pieces for item in reader.push(piece)] + reader.finish():
        if found and isinstance(item, str) and isinstance(found[-1], str):
            found[-1] += item
        else:
            found.append(item)
    return found


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("hermes", "plain < text <tool", ["plain < text <tool"]),
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
         [ROME]),
        ("hermes", 'Wait. <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
         '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
         ["Wait. ", ROME, Call("f", "{}")]),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}', [ROME]),
        ("hermes", "<tool_call>{broken</tool_call> on", ["<tool_call>{broken</tool_call> on"]),
        ("hermes", "<tool_call>\n<function=weather>\n<parameter=city>\n7\n</parameter>\n"
         "<parameter=days>\n7\n</parameter>\n</function>\n</tool_call>", [BOTH]),
        ("hermes", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>7</arg_value>\n"
         "<arg_key>days</arg_key>\n<arg_value>7</arg_value>\n</tool_call>", [BOTH]),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]', [ROME]),
        ("mistral", 'So: [TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]f{}',
         ["So: ", ROME, Call("f", "{}")]),
        ("mistral", "[TOOL_CALLS]broken", ["[TOOL_CALLS]broken"]),
        ("llama", '{"name": "weather", "parameters": {"city": "Rome"}}', [ROME]),
        ("llama", '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}; '
         '{"name": "weather", "parameters": {"city": "Rome"}}', [ROME, ROME]),
        ("llama", '[weather(city="Rome")]', [ROME]),
        ("llama", '{"name": "Ann", "parameters": {}}', ['{"name": "Ann", "parameters": {}}']),
        ("llama", "[1] is a list", ["[1] is a list"]),
        ("llama", "plain", ["plain"]),
        ("llama", "[" * 5000, ["[" * 5000]),
    ],
)  # fmt: skip
def test_calls_are_read_however_the_text_is_cut(
    form: str, text: str, expected: Read, size: int
) -> None:
    assert read(form, text, size) == expected


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_thoughts_answers_and_calls_of_harmony_are_told_apart(size: int) -> None:
    said = (
        "<|channel|>analysis<|message|>Let me think.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>I will look.<|end|><|start|>assistant<|channel|>commentary to=functions.weather"
        ' <|constrain|>json<|message|>{"city": "Rome"}<|call|>'
    )
    found = read("harmony", said, size)
    assert "".join(item.text for item in found if isinstance(item, Thought)) == "Let me think."
    assert [item for item in found if not isinstance(item, Thought)] == ["I will look.", ROME]
    assert read("harmony", "plain <| text", size) == ["plain <| text"]
    final = "<|channel|>final<|message|>Hello<|return|>"
    assert read("harmony", final, size) == ["Hello"]
    named = "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>"
    assert read("harmony", named, size) == [Call("f", "{}")]


def test_text_that_opens_no_call_is_not_held_back() -> None:
    reader = reader_of(None, "hermes", {})
    assert reader.push("Hello <b") == ["Hello <b"]
    assert reader.push("r> <tool") == ["r> "]
    assert reader.push("s>") == ["<tools>"]


def test_the_format_is_told_by_the_template() -> None:
    assert format_of(TEMPLATE) == "hermes"
    assert format_of("{{ '[TOOL_CALLS]' }}") == "mistral"
    assert format_of("{{ messages }}") is None


def test_definitions_of_tools_are_found_from_the_top_of_the_schema() -> None:
    def tool(name: str, definition: dict[str, Any]) -> Tool:
        parameters = {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}}
        function = {"name": name, "parameters": parameters | {"$defs": {"X": definition}}}
        return Tool.model_validate({"type": "function", "function": function})

    number, text = {"type": "integer"}, {"type": "string"}
    schema = schema_of_calls([tool("f", number), tool("g", number)], 1)
    assert schema["$defs"] == {"X": number} and schema["maxItems"] == 1
    with pytest.raises(ValueError, match="define 'X' differently"):
        schema_of_calls([tool("f", number), tool("g", text)], None)


# ---------------------------------------------------------------------- answers


def answered(text: str, **asked: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The choice that is the answer with `text`, whole and streamed."""
    tokenizer = tiny_tokenizer()
    body = ChatBody.of({"messages": HI, "tools": [WEATHER]} | asked)
    ids = tokenizer(text).input_ids
    result = Result(id="r", text=text, token_ids=tuple(ids), num_prompt=1, finish="stop")

    def answer() -> ChatAnswer:
        form = "hermes" if body.may_call else None
        return ChatAnswer(body, "tiny", [[1]], TokenText(tokenizer), {}, form)

    whole, streamed = answer().whole([result])["choices"][0], answer()
    deltas: list[Any] = [Delta("r", 70, char) for char in text]
    events = [event for item in (*deltas, result) for event in streamed.events(0, item)]
    return whole, [event["choices"][0] for event in events]


def test_a_call_is_a_tool_call_whole_or_streamed() -> None:
    text = 'Let me see.<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    whole, streamed = answered(text)
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Let me see."
    (call,) = whole["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", ROME._asdict())
    assert "".join(one["delta"].get("content") or "" for one in streamed) == "Let me see."
    (calls,) = [one["delta"]["tool_calls"] for one in streamed if "tool_calls" in one["delta"]]
    assert calls[0]["index"] == 0 and calls[0]["id"] and calls[0]["function"] == ROME._asdict()
    assert streamed[-1]["finish_reason"] == "tool_calls"


def test_without_parallel_calls_there_is_one() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' * 2
    for parallel, count in ((True, 2), (False, 1)):
        whole, streamed = answered(text, parallel_tool_calls=parallel)
        assert len(whole["message"]["tool_calls"]) == count
        assert whole["message"]["content"] is None
        assert sum("tool_calls" in one["delta"] for one in streamed) == count


def test_a_choice_of_none_reads_no_calls() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    whole, _ = answered(text, tool_choice="none")
    assert (whole["message"]["content"], whole["finish_reason"]) == (text, "stop")


def test_special_tokens_that_tell_calls_are_part_of_what_is_read() -> None:
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("[TOOL_CALLS]")]})
    marker: Any = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    calls = '[{"name": "weather", "arguments": {"city": "Rome"}}]'
    ids: list[int] = [marker, *tokenizer(calls).input_ids]
    body = ChatBody.of({"messages": HI, "tools": [WEATHER]})
    text = TokenText(tokenizer)
    answer = ChatAnswer(body, "tiny", [[1]], text, {marker: "[TOOL_CALLS]"}, "mistral")
    result = Result(id="r", text=calls, token_ids=tuple(ids), num_prompt=1, finish="stop")
    (choice,) = answer.whole([result])["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == ROME._asdict()


def test_a_stop_string_ends_the_text_among_special_tokens_too() -> None:
    tokenizer = tiny_tokenizer()
    ids = [7, *tokenizer("abc").input_ids, 7, *tokenizer("def").input_ids]
    assert TokenText(tokenizer).joined(ids, {7: "<m>"}, 4) == "<m>abc<m>d"


def test_strict_is_reported_where_the_model_is_not_held_to_it() -> None:
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    asked = {"messages": HI, "tools": [strict]}
    assert ChatBody.of(asked).headers == {"x-ignored-fields": "tools.function.strict"}
    assert ChatBody.of(asked | {"tool_choice": "required"}).headers == {}


# ---------------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def tools_client(engine: Engine) -> Iterator[openai.OpenAI]:
    with running(engine, template=TEMPLATE, context=1500) as address, connect(address) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_call_that_is_required_is_made_and_fits_the_schema(
    tools_client: openai.OpenAI, choice: str, stream: bool
) -> None:
    pytest.importorskip("llguidance")
    named = {"type": "function", "function": {"name": "weather"}}
    function = WEATHER["function"] | {
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        }
    }
    asked: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 300, "seed": 1}
    asked |= {"tools": [{"type": "function", "function": function}], "parallel_tool_calls": False}
    asked |= {"tool_choice": named if choice == "named" else choice}
    if stream:
        chunks = list(tools_client.chat.completions.create(**asked, stream=True))
        calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
        finish = chunks[-1].choices[0].finish_reason
    else:
        said = tools_client.chat.completions.create(**asked).choices[0]
        calls, finish = said.message.tool_calls or [], said.finish_reason
        assert said.message.content is None
    (call,) = calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    assert finish == "tool_calls"


def test_a_conversation_with_calls_and_their_results_goes_through_the_template(
    tools_client: openai.OpenAI,
) -> None:
    messages: list[Any] = [
        *HI,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    said = tools_client.chat.completions.create(
        model="tiny", messages=messages, tools=[WEATHER], max_tokens=2
    )
    text = 'user: hi\nassistant: weather({"city": "Rome"})\ntool: sunny\nassistant:'
    tools = json.dumps([WEATHER]) + " as <tool_call>"
    expected = len(tiny_tokenizer()(tools + text).input_ids)
    assert said.usage is not None and said.usage.prompt_tokens == expected


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "none of the tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "name"),
        ({"tools": [{"type": "retrieval"}]}, "type"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
    ],
)
def test_what_tools_cannot_be_called_with_is_refused(
    tools_client: openai.OpenAI, asked: dict[str, Any], told: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=told):
        tools_client.chat.completions.create(
            **({"model": "tiny", "messages": HI, "tools": [WEATHER]} | asked)
        )


def test_tools_are_refused_where_the_model_would_not_see_them(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HI, "tools": [WEATHER]}
    for choice in ("auto", "required"):
        with pytest.raises(openai.BadRequestError, match="template takes none") as refused:
            client.chat.completions.create(**asked, tool_choice=choice)
        assert refused.value.param == "tools"


def test_tools_are_refused_where_calls_could_not_be_read(engine: Engine) -> None:
    template = "{{ tools | tojson }}{{ messages[0].content }}"
    asked: dict[str, Any] = {"model": "tiny", "messages": HI, "tools": [WEATHER], "max_tokens": 2}
    with running(engine, template=template, context=1000) as address, connect(address) as client:
        with pytest.raises(openai.BadRequestError, match="name --tool_format"):
            client.chat.completions.create(**asked)
        assert client.chat.completions.create(**asked, tool_choice="none").choices
    named: dict[str, Any] = {"template": template, "context": 1000, "tool_format": "llama"}
    with running(engine, **named) as address, connect(address) as client:
        assert client.chat.completions.create(**asked).choices


def test_a_required_call_without_tools_is_refused() -> None:
    body = ChatBody.of({"messages": HI, "tool_choice": "required"})
    with pytest.raises(Refused, match="no tools"):
        body.check(max_choices=1, max_priority=0)
