"""Rows as documents: plain text, or one of the known forms of conversations.

    text                              plain text
    messages, conversations, ...      turns {role, content} or {from, value}; content may be parts
    prompt + completion or response   two turns, or two lists of turns
    instruction (+ input) + output    two turns (also + response)
    question + answer                 two turns
    chosen, rejected                  refused: which of them is meant, only the user knows

Whatever else a row holds is refused by name. Turns are never guessed, and never empty unless their
source says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Turn = dict[str, Any]
Row = Mapping[str, Any]

CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
QUESTIONS = ("prompt", "instruction", "question", "query")
ANSWERS = ("completion", "response", "output", "answer")
ADDITIONS = ("input", "context")
"""Columns that belong to a question."""
SYSTEMS = ("system", "system_prompt")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Names of speakers in {from, value}."""


def content_of(row: Row, column: str | None) -> str | list[Turn]:
    """The text or the turns of a row. Raises ValueError, naming what it found, for anything else.

    column: the one to read; None looks for `text`, then for the forms above.
    """
    if column is not None:
        require(row, column)
        return _text_or_turns(row[column], column)
    if row.get("text") is not None:
        return _text_or_turns(row["text"], "text")
    for name in CHATS:
        if row.get(name) is not None:
            return _text_or_turns(row[name], name)
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise ValueError("its rows are preference pairs: give --column chosen or --column rejected")
    question = next((name for name in QUESTIONS if row.get(name) is not None), None)
    answer = next((name for name in ANSWERS if row.get(name) is not None), None)
    if question and answer:
        return _system(row) + _pair(row, question, answer)
    if question == "prompt" and not any(name in row for name in ANSWERS):
        return _text_or_turns(row["prompt"], "prompt")
    if "text" in row:  # a row without text among others that have some
        return ""
    raise ValueError(
        f"no column 'text' and no known form of chat; its columns are {', '.join(map(str, row))}: "
        "give --column"
    )


def require(row: Row, column: str) -> None:
    """Raise ValueError, with the columns that there are, unless `column` is one of them."""
    if column not in row:
        raise ValueError(f"no column {column!r}; its columns are {', '.join(map(str, row))}")


def _text_or_turns(value: Any, column: str) -> str | list[Turn]:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_turn(turn, column) for turn in value]
    raise ValueError(f"the column {column!r} holds {type(value).__name__}, neither text nor turns")


def _system(row: Row) -> list[Turn]:
    for name in SYSTEMS:
        if isinstance(row.get(name), str) and row[name].strip():
            return [{"role": "system", "content": row[name]}]
    return []


def _pair(row: Row, question: str, answer: str) -> list[Turn]:
    """A question and its answer as turns; each a text, or already a list of turns."""
    if row.get("history"):
        raise ValueError("its rows have a column 'history', which would be lost: give --column")
    asked, answered = row[question], row[answer]
    if isinstance(asked, list) and isinstance(answered, list):
        return [_turn(turn, question) for turn in asked] + [_turn(t, answer) for t in answered]
    for name, value in ((question, asked), (answer, answered)):
        if not isinstance(value, str):
            raise ValueError(
                f"the column {name!r} holds {type(value).__name__}, not text: give --column"
            )
    more = [row[name] for name in ADDITIONS if isinstance(row.get(name), str) and row[name].strip()]
    return [
        {"role": "user", "content": "\n\n".join([asked, *more])},
        {"role": "assistant", "content": answered},
    ]


def _turn(value: Any, column: str) -> Turn:
    """A turn {role, content} with the other keys it has, out of one of its known forms."""
    if not isinstance(value, dict):
        raise ValueError(
            f"the column {column!r} holds a list of {type(value).__name__}, not of turns"
        )
    turn = {key: entry for key, entry in value.items() if entry is not None}
    if "from" in turn and "value" in turn and "role" not in turn:
        speaker = turn.pop("from")
        if str(speaker).lower() not in ROLES:
            raise ValueError(f"the column {column!r} has a turn of the unknown role {speaker!r}")
        turn = {"role": ROLES[speaker.lower()], "content": turn.pop("value"), **turn}
    if not isinstance(turn.get("role"), str) or not ("content" in turn or turn.get("tool_calls")):
        raise ValueError(
            f"the column {column!r} has a turn with {', '.join(map(str, value)) or 'nothing'}, not "
            "role and content, nor from and value"
        )
    return turn | {"content": _flat(turn.get("content", ""), column)}


def _flat(content: Any, column: str) -> str:
    """The text of a turn; parts {type: text, text: ...} are joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, str | dict) for part in content):
        texts = [part if isinstance(part, str) else part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
        kinds = {str(part.get("type")) for part in content if isinstance(part, dict)} - {"text"}
        raise ValueError(
            f"the column {column!r} has turns with {', '.join(sorted(kinds)) or 'parts'}: only "
            "text can be traced"
        )
    raise ValueError(
        f"the column {column!r} has a turn whose content is {type(content).__name__}, not text"
    )


def is_blank(content: str | list[Turn]) -> bool:
    """Whether there is nothing to trace in it."""
    if isinstance(content, str):
        return not content.strip()
    return not any(turn["content"].strip() or turn.get("tool_calls") for turn in content)
