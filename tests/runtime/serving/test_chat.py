"""Conversations as prompts: the messages that clients send, and templates that reject them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.serving.chat import check_template, conversation_of, read_template, render_chat
from tests.helpers.tiny import tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
HI = [{"role": "user", "content": "hi"}]


def text(messages: Any, template: str | None = TEMPLATE, **variables: Any) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    ids = render_chat(tokenizer, messages, template, **variables)
    return str(tokenizer.decode(ids))


def test_parts_of_text_are_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert text([{"role": "user", "content": parts}]) == "user: one\ntwo\nassistant:"


def test_a_developer_is_the_system_to_a_template_that_knows_no_developer() -> None:
    asked = [{"role": "developer", "content": "be brief"}]
    assert text(asked) == "system: be brief\nassistant:"
    knowing = "{# developer #}" + TEMPLATE
    assert text(asked, knowing) == "developer: be brief\nassistant:"


def test_arguments_of_calls_are_objects_and_names_are_kept() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    said = conversation_of(
        [
            {"role": "assistant", "content": None, "tool_calls": [call], "audio": None},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            {"role": "user", "name": "ann", "content": "hi", "tool_calls": []},
        ],
        "",
    )
    assert said[0]["content"] == ""
    assert said[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert said[1] == {"role": "tool", "tool_call_id": "1", "content": "2"}
    assert said[2] == {"role": "user", "name": "ann", "content": "hi"}


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "messages must be a list"),
        ("hi", "messages must be a list"),
        (["hi"], "messages must be a list"),
        ([{"content": "hi"}], r"messages\[0\]: role=None"),
        ([{"role": "robot", "content": "hi"}], "role='robot'"),
        ([*HI, {"role": "user"}], r"content of messages\[1\] is none"),
        ([{"role": "user", "content": 7}], "a content of text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url': only parts of text"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "'input_audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "only parts of text"),
        ([{"role": "user", "content": [{"type": []}]}], "only parts of text"),
        ([{"role": "assistant", "audio": {"id": "1"}, "content": "a"}], "audio"),
        ([{"role": "assistant", "tool_calls": [{}]}], "no function with a name"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "no JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}],
            "no object",
        ),
    ],
)
def test_messages_that_cannot_be_shown_are_refused(messages: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        text(messages)


def test_a_template_rejects_messages_in_its_own_words() -> None:
    picky = "{{ raise_exception('Only users may speak') }}"
    with pytest.raises(ValueError, match="rejects these messages: Only users may speak"):
        text(HI, picky)


def test_without_a_template_the_remedy_is_named() -> None:
    with pytest.raises(ValueError, match="no chat template: name one with --chat_template"):
        text(HI, None)


def test_variables_reach_the_template_but_not_its_frame() -> None:
    template = "{% if enable_thinking %}think{% endif %}{{ messages[0].content }}"
    assert text(HI, template) == "hi"
    assert text(HI, template, enable_thinking=True) == "thinkhi"
    with pytest.raises(ValueError, match="tokenize is no variable"):
        text(HI, template, tokenize=True)


def test_the_last_message_can_be_continued() -> None:
    asked = [*HI, {"role": "assistant", "content": "well"}]
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert text(asked, template, continue_final_message=True) == "user: hi\nassistant: well"


def test_tools_are_refused_by_a_template_that_takes_none() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(ValueError, match="tools: the model's chat template takes none"):
        text(HI, tools=[tool])
    assert '"name": "f"' in text(HI, "{{ tools | tojson }}", tools=[tool])


# ---------------------------------------------------------------------- a template that is given


def test_a_template_is_a_file_or_the_text_itself(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    assert read_template(str(file)) == read_template(TEMPLATE) == TEMPLATE


def test_a_template_that_is_missing_or_broken_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"chat_template='.*missing\.jinja' is neither a file"):
        read_template(str(tmp_path / "missing.jinja"))
    for broken in ("{% for m in messages %}", "{{ messages | nonsense }}", "{{ 1 + }}"):
        with pytest.raises(ValueError, match="chat_template: line 1"):
            check_template(tiny_tokenizer(), broken)
    check_template(tiny_tokenizer(), TEMPLATE)
    check_template(tiny_tokenizer(), "{{ raise_exception('not these') }}")
