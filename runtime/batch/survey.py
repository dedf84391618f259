"""A survey of a data set before the model is loaded: what it is, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from runtime.serving.batch.columns import COLUMNS, unread
from runtime.serving.batch.rows import Row

DIGEST_BYTES = 16
OPENAI_COLUMNS = ("custom_id", "method", "url", "body")


class Survey(NamedTuple):
    """The rows of a data set."""

    digest: str
    """Fingerprint of all of them."""
    num_rows: int
    has_openai: bool
    """Lines of OpenAI's batch API are among them."""


def is_openai(data: dict[str, Any]) -> bool:
    """Tell a line of OpenAI's batch API: it is sent to an address and has no prompt of its own."""
    if "prompt" in data or "messages" in data:
        return False
    return "url" in data and ("body" in data or "method" in data)


def survey(rows: Iterable[Row], ignore: list[str]) -> Survey:
    """Read all rows. Raises ValueError for a misspelt option, and for a custom_id that is not one.

    Warns of columns that nothing reads and of ids that come twice.
    """
    digest, count = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
    has_openai, columns, ids = False, Counter[str](), _Ids()
    for count, row in enumerate(rows, 1):  # noqa: B007 - the count is what is wanted
        digest.update(_bytes_of(row))
        if isinstance(row.data, ValueError):
            continue
        openai = is_openai(row.data)
        has_openai |= openai
        ids.add(row, openai)
        try:
            columns.update(unread(row.data, ignore, OPENAI_COLUMNS if openai else COLUMNS))
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
    if columns:
        told = ", ".join(f"{name} ({number} rows)" for name, number in columns.most_common(20))
        print(f"columns that are not read: {told}", file=sys.stderr)
    ids.tell()
    return Survey(digest.hexdigest(), count, has_openai)


def unchanged(rows: Iterable[Row], digest: str) -> Iterator[Row]:
    """The rows again. Raises ValueError at their end where they are not those of the survey."""
    again = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for row in rows:
        again.update(_bytes_of(row))
        yield row
    if again.hexdigest() != digest:
        raise ValueError("the data set has changed while it was read: start again")


def _bytes_of(row: Row) -> bytes:
    return repr(row.data).encode(errors="backslashreplace")


class _Ids:
    """The ids of rows, and the first that comes twice."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}
        self._num_twice, self._twice = 0, ""

    def add(self, row: Row, openai: bool) -> None:
        assert isinstance(row.data, dict)
        id = row.data.get("custom_id", None if openai else row.data.get("id"))
        if id is None:
            return
        text = json.dumps(id, default=str)
        before = self._places.setdefault(text, row.place)
        if before == row.place:
            return
        if openai:
            raise ValueError(
                f"{row.place}: the custom_id {text} is that of {before} too, so that their answers "
                "could not be told apart"
            )
        self._num_twice += 1
        self._twice = self._twice or f"{text} in {before} and {row.place}"

    def tell(self) -> None:
        if self._num_twice:
            print(
                f"{self._num_twice} rows have the id of an earlier row: {self._twice}; `index` "
                "tells their results apart",
                file=sys.stderr,
            )
