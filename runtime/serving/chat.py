"""Conversations as prompts, through the tokenizer's chat template or one that is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of a content's parts that are text, and the key that holds it."""

RENDERED = ("add_generation_prompt", "continue_final_message")
"""What `render_chat` passes on beside a template's own variables."""

RESERVED = frozenset(
    (
        "conversation", "messages", "tools", "documents", "chat_template", "tokenize",
        "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors",
        "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    )
)  # fmt: skip
"""Names that are no variables of a template."""


def render_chat(
    tokenizer: Any,
    messages: Any,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> list[int]:
    """Token ids of `messages` up to where the assistant's answer begins.

    template: in place of the tokenizer's own. variables: more of the template's. Raises ValueError
    where there is no chat template, where it takes no tools but some are given, and where it
    rejects the messages.
    """
    source = template_of(tokenizer, template, tools)
    conversation = conversation_of(messages, source)
    if reserved := sorted(RESERVED & variables.keys()):
        raise ValueError(f"{reserved[0]} is no variable of a chat template")
    options = {"add_generation_prompt": True} | variables
    if options.get("continue_final_message") and "add_generation_prompt" not in variables:
        options["add_generation_prompt"] = False
    try:
        text = tokenizer.apply_chat_template(
            conversation,
            tools=None if tools is None else [dict(tool) for tool in tools],
            chat_template=source,
            tokenize=False,
            **options,
        )
    except Exception as error:  # a template can raise anything; what it says is about the messages
        raise ValueError(f"the chat template rejects these messages: {error!s:.200}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def template_of(
    tokenizer: Any, template: str | None = None, tools: Sequence[Any] | None = None
) -> str:
    """The text of the template. Raises ValueError where there is none, or none that takes tools."""
    if template is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the model's tokenizer has no chat template: name one with --chat_template, or give a "
            "prompt instead"
        )
    source: str = tokenizer.get_chat_template(template, tools or None)
    if tools and "tools" not in source:
        raise ValueError("tools: the model's chat template takes none")
    return source


def read_template(given: str) -> str:
    """A chat template out of a file, or the text itself where it is one. Raises ValueError."""
    if any(mark in given for mark in ("{{", "{%", "{#", "\n")):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"chat_template={given!r:.200} is neither a file that can be read nor a template "
            f"({error})"
        ) from error


def check_template(tokenizer: Any, template: str) -> None:
    """Raise ValueError for a template that cannot be compiled; what it says is not looked at."""
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}], chat_template=template, tokenize=False
        )
    except Exception as error:
        line = getattr(error, "lineno", None)
        if line is not None:  # Jinja's errors of syntax; else of these messages alone
            raise ValueError(f"chat_template: line {line}: {error}") from error


def conversation_of(messages: Any, template: str) -> list[dict[str, Any]]:
    """The messages in the form that templates expect: texts, and arguments of calls as objects.

    A developer is the system to a template that does not know developers. Raises ValueError.
    """
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise ValueError("messages must be a list of objects with a role and a content of text")
    return [_message(message, at, template) for at, message in enumerate(messages)]


def _message(message: dict[str, Any], at: int, template: str) -> dict[str, Any]:
    role, where = message.get("role"), f"messages[{at}]"
    if role not in ROLES:
        raise ValueError(f"{where}: role={role!r:.60} is not one of {', '.join(ROLES)}")
    if role == "developer" and "developer" not in template:
        role = "system"
    calls = message.get("tool_calls") or None
    if message.get("audio") or message.get("function_call"):
        raise ValueError(f"{where}: audio and function_call are not supported")
    said = {key: value for key, value in message.items() if value is not None}
    said |= {"role": role, "content": _content(message.get("content"), where, calls is not None)}
    said.pop("tool_calls", None)
    return said | ({"tool_calls": [_call(call, where) for call in calls]} if calls else {})


def _content(content: Any, where: str, may_lack: bool) -> str:
    """The text of a message's content: a text, or parts that are texts, a line each."""
    if content is None and may_lack:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(
            f"messages must be a list of objects with a role and a content of text; the content of "
            f"{where} is none"
        )
    return "\n".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    key = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    text = part.get(key) if key is not None else None
    if not isinstance(text, str):
        raise ValueError(f"{where}: a part of type {kind!r:.60}: only parts of text are supported")
    return text


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call of a tool, its arguments as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: a call in tool_calls has no function with a name")
    arguments = function.get("arguments") or {}
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the arguments of a call are no JSON: {error!s:.100}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: the arguments of a call are no object")
    return call | {"function": function | {"arguments": arguments}}
