"""Columns of rows: those that are read, those that are misspelt, those that are left alone."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable

from runtime.serving.request import Request

OPTIONS = tuple(
    f.name
    for f in dataclasses.fields(Request)
    if f.name not in ("prompt", "id", "on_token", "group")
)
"""What a row may say for itself: the fields of a request."""

COLUMNS = ("prompt", "messages", "tools", "id", "custom_id", *OPTIONS)
ELSEWHERE = {
    "best_of": "",
    "do_sample": "temperature",
    "echo": "",
    "eos_token_id": "stop_token_ids",
    "guided_json": "json_schema",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_beams": "",
    "num_return_sequences": "",
    "response_format": "json_schema",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "tool_choice": "",
    "top_logprobs": "logprobs",
}
"""Options of other programs, and what they are called here."""
CLOSE = 0.88


def misspelt(name: str, known: Collection[str] = COLUMNS) -> str | None:
    """The name that `name` was meant to be, if it is close to one of `known`."""
    if name in known:
        return None
    plain = _plain(name)
    same = [one for one in known if _plain(one) == plain]
    near = same or difflib.get_close_matches(name.lower(), known, 1, CLOSE)
    return near[0] if near else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def unread(names: Iterable[str], ignore: Collection[str], known: Collection[str]) -> list[str]:
    """The names that nothing reads. Raises ValueError for one that looks like an option."""
    others = [name for name in names if name not in known and name not in ignore]
    for name in others:
        meant = misspelt(name, known)
        if meant is None and name in ELSEWHERE:
            meant = ELSEWHERE[name]
        if meant is not None:
            hint = f"; did you mean {meant!r}?" if meant else ""
            raise ValueError(
                f"{name!r} is no option of a row{hint} Rename it, or let it be with --ignore {name}"
            )
    return others
