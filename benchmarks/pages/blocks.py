"""Blocks of a document that are made from JSON files.

    <!-- table: kinds-winners 2026-11-29-rivals-moe-8x32.json -->
    <!-- end -->

The first words are the name of a table and the files that it is made of, in docs/results; a name
with a `*` stands for all files that fit. Words with a `=` are the table's options. All that stands
between the two lines is replaced; the rest of a document is written by hand.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Tables = Mapping[str, Callable[..., Iterable[str]]]

START = "<!-- table: "
END = "<!-- end -->"
BLOCK = re.compile(
    rf"^{START}(?P<words>[^\n]+) -->\n(?P<body>.*?)^{END}$", re.MULTILINE | re.DOTALL
)


def filled(text: str, tables: Tables, results: Path) -> str:
    """The text of a document with every block made anew. results: the folder of the files."""
    blocks = list(BLOCK.finditer(text))
    starts = re.findall(f"^{START}", text, re.MULTILINE)
    if len(blocks) != len(starts) or any(START in block["body"] for block in blocks):
        raise ValueError(f"a block has no line {END!r}")
    return BLOCK.sub(lambda block: _block(block["words"], tables, results), text)


def _block(words: str, tables: Tables, results: Path) -> str:
    name, *others = shlex.split(words)
    if name not in tables:
        raise ValueError(f"{words}: there is no table {name!r}; there are {', '.join(tables)}")
    files = [word for word in others if "=" not in word]
    options = dict(word.split("=", 1) for word in others if "=" in word)
    documents = [document for file in files for document in _documents(file, results)]
    try:
        inspect.signature(tables[name]).bind(*documents, **options)
    except TypeError as error:
        raise ValueError(f"{words}: {error}") from None
    try:
        return "\n".join([f"{START}{words} -->", *tables[name](*documents, **options), END])
    except KeyError as error:
        raise ValueError(f"{words}: the files have no {error}") from error


def _documents(pattern: str, results: Path) -> Sequence[dict[str, Any]]:
    """The JSON objects of the files that fit, each with its name without ending as `file`."""
    paths = sorted(results.glob(pattern))
    if not paths:
        raise ValueError(f"{results / pattern} is not there")
    return [{"file": path.stem} | json.loads(path.read_text(encoding="utf-8")) for path in paths]
