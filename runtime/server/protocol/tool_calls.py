"""Calls of tools out of a model's text, as it comes.

Text is held back while it may open a call. What looks like a call but cannot be read is text.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from runtime.server.protocol.tool_formats import (
    Call,
    Schemas,
    arguments_of,
    calls_of_json,
    read_beginning,
    read_mistral,
    read_tagged,
)

OPENERS = {
    "harmony": "<|channel|>",
    "mistral": "[TOOL_CALLS]",
    "hermes": "<tool_call>",
    "llama": "<|python_tag|>",
}
"""What tells each format in a chat template."""

MARKS = (
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<tool_call>", "</tool_call>", "<|python_tag|>",
    "<|python_start|>", "<|python_end|>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
"""Tokens that tell calls, and that may be special: left out of a text."""

HARMONY = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>",
           "<|call|>")  # fmt: skip


class Thought(NamedTuple):
    """A piece of what the model says to itself."""

    text: str


Read = list[str | Thought | Call]


def format_of(template: str) -> str | None:
    """The format in which a chat template shows calls; None where it is none of these."""
    return next((name for name, opener in OPENERS.items() if opener in template), None)


def markers_of(tokenizer: Any) -> dict[int, str]:
    """Special tokens that tell calls, by their ids."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {
        token_id: token.content
        for token_id, token in added.items()
        if token.special and token.content in (*MARKS, *HARMONY)
    }


class Reader(ABC):
    """Reads one choice's text: pieces of text, and calls."""

    @abstractmethod
    def push(self, text: str) -> Read:
        """What is certain after some more text."""

    @abstractmethod
    def finish(self) -> Read:
        """What is left at the end."""


class TextReader(Reader):
    """Text without calls."""

    def push(self, text: str) -> Read:
        return [text] if text else []

    def finish(self) -> Read:
        return []


class WholeReader(Reader):
    """A text that is calls from beginning to end, by its grammar."""

    def __init__(self, name: str) -> None:
        """name: the function that is called; "" where the text names it."""
        self._name, self._text = name, ""

    def push(self, text: str) -> Read:
        self._text += text
        return []

    def finish(self) -> Read:
        if self._name:
            return [Call(self._name, self._text)] if self._text else []
        try:
            return [*calls_of_json(json.loads(self._text))]
        except (ValueError, RecursionError):  # cut short by max_tokens
            return [self._text] if self._text else []


class TaggedReader(Reader):
    """Text with calls between an opening and a closing mark."""

    def __init__(self, schemas: Schemas) -> None:
        self._schemas, self._held, self._inside = schemas, "", False

    opener, closer = "<tool_call>", "</tool_call>"

    def read(self, block: str) -> list[Call]:
        """The calls between the marks. Raises ValueError for a block that has none."""
        return read_tagged(block, self._schemas)

    def push(self, text: str) -> Read:
        self._held += text
        read: Read = []
        while True:
            mark = self.closer if self._inside else self.opener
            before, found, after = self._held.partition(mark)
            if not found:
                break
            self._held = after
            read += self._block(before, closed=True) if self._inside else _text(before)
            self._inside = not self._inside
        if not self._inside:
            kept = _overlap(self._held, self.opener)
            read += _text(self._held[: len(self._held) - kept])
            self._held = self._held[len(self._held) - kept :]
        return read

    def finish(self) -> Read:
        held, self._held = self._held, ""
        return self._block(held, closed=False) if self._inside else _text(held)

    def _block(self, block: str, *, closed: bool) -> Read:
        try:
            return [*self.read(block)]
        except (ValueError, RecursionError):
            return [self.opener + block + (self.closer if closed else "")]


class MistralReader(TaggedReader):
    """Text with calls after a mark, up to the next one or to the end."""

    opener, closer = "[TOOL_CALLS]", "[TOOL_CALLS]"

    def read(self, block: str) -> list[Call]:
        return read_mistral(block)

    def _block(self, block: str, *, closed: bool) -> Read:
        """The closing mark opens the next block."""
        if closed:
            self._held, self._inside = self.opener + self._held, True
        try:
            return [*self.read(block)]
        except (ValueError, RecursionError):
            return [self.opener + block]


class BeginningReader(Reader):
    """Text that is a call if it begins like one."""

    def __init__(self, schemas: Schemas) -> None:
        self._schemas, self._held, self._is_text = schemas, "", False

    def push(self, text: str) -> Read:
        if self._is_text:
            return _text(text)
        self._held += text
        begun = self._held.lstrip()
        marks = ("{", "[", "<|python_tag|>", "<|python_start|>")
        if any(begun.startswith(mark) or mark.startswith(begun) for mark in marks):
            return []
        self._is_text, held, self._held = True, self._held, ""
        return _text(held)

    def finish(self) -> Read:
        if not self._held:
            return []
        try:
            return [*read_beginning(self._held, self._schemas)]
        except (ValueError, RecursionError):
            return [self._held]


class HarmonyReader(Reader):
    """Messages of gpt-oss: thoughts, texts, and calls, each after a header.

    <|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>
    """

    def __init__(self) -> None:
        self._held, self._header = "", ""
        self._in_header, self._channel = False, "final"
        self._name, self._arguments = "", ""

    def push(self, text: str) -> Read:
        self._held += text
        read: Read = []
        while found := _HARMONY_MARK.search(self._held):
            before, self._held = self._held[: found.start()], self._held[found.end() :]
            read += self._take(before) + self._turn(found[0])
        certain = len(self._held) - max(_overlap(self._held, mark) for mark in HARMONY)
        read += self._take(self._held[:certain])
        self._held = self._held[certain:]
        return read

    def finish(self) -> Read:
        held, self._held = self._held, ""
        return self._take(held) + self._end_call()

    def _take(self, text: str) -> Read:
        if self._in_header:
            self._header += text
        elif self._name:
            self._arguments += text
        elif text:
            return [Thought(text)] if self._channel == "analysis" else [text]
        return []

    def _turn(self, mark: str) -> Read:
        """Go on after a mark."""
        if mark == "<|message|>":
            recipient = _RECIPIENT.search(self._header)
            self._name = recipient[1] if recipient else ""
            channel = self._header.rpartition("<|channel|>")[2].split()
            self._channel = channel[0] if channel else "final"
            self._in_header, self._header = False, ""
            return []
        ended = self._end_call()
        if mark in ("<|start|>", "<|channel|>", "<|constrain|>"):
            self._header = (self._header if self._in_header else "") + mark
            self._in_header = True
        else:
            self._in_header, self._channel = False, "final"
        return ended

    def _end_call(self) -> Read:
        name, arguments, self._name, self._arguments = self._name, self._arguments, "", ""
        if not name:
            return []
        try:
            return [Call(name, arguments_of(arguments or "{}"))]
        except (ValueError, RecursionError):
            return [arguments]


_HARMONY_MARK = re.compile("|".join(map(re.escape, HARMONY)))
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")


def reader_of(must_call: str | None, form: str | None, schemas: Schemas) -> Reader:
    """The reader of a choice. form: None where no calls are to be read."""
    if must_call is not None:
        return WholeReader(must_call)
    kinds: Mapping[str | None, Any] = {
        "hermes": TaggedReader,
        "mistral": MistralReader,
        "llama": BeginningReader,
    }
    if form == "harmony":
        return HarmonyReader()
    return kinds[form](schemas) if form in kinds else TextReader()


def _text(text: str) -> Read:
    return [text] if text else []


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)
