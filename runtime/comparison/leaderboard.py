"""The leaderboard: figures of many contenders on the same routes, in a file that others can add to.

A .json file is `{"kind", "schema", "entries": [...]}`, a .csv file has a header and a row for each
entry. An entry says what was run (`contender`), on what (`model`, `routes`, `label`), how
(`residency` and the protocol's fields), its figures, and by whom (`by`). Two entries that agree in
`KEY` are of the same thing: they replace each other where `by` is the same, and contradict each
other where figures differ and `by` does too.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routing.shards import write_atomically
from runtime.comparison.figures import Figures
from runtime.comparison.settings import CompareSettings

if TYPE_CHECKING:
    from routing.topology import Topology

KIND, SCHEMA = "expertflow-leaderboard", 1
Entry = dict[str, Any]

TEXT = ("contender", "by", "model", "routes", "label", "cache")
COUNTS = ("tokens", "warm_up")
AMOUNTS = ("expert_mb", "link_gb_s", "layer_ms", "mb_per_token")
SHARES = ("residency", "hit_rate")
OPTIONAL_SHARES = ("recall_at_k", "recall_at_c", "timely")
OPTIONAL_NUMBERS = ("gap_lru", "gap_best", "ms_per_token", "ms_priced", "wasted_mb")
REQUIRED = (*TEXT, *COUNTS, *AMOUNTS, *SHARES)
FIELDS = (*REQUIRED, *OPTIONAL_SHARES, *OPTIONAL_NUMBERS)
TRIAL = ("model", "routes", "label", "residency", "cache", "warm_up")
"""The fields of what hit rates are comparable on."""
KEY = ("contender", *TRIAL)
TOLERANCE = 1e-6
"""Difference of figures of the same thing that rounding may make."""


def entries_of(
    figures: Iterable[Figures], topology: Topology, routes: str, settings: CompareSettings
) -> list[Entry]:
    """The entries of a comparison. routes: the digest of what was compared on."""
    common = {
        "by": settings.by,
        "model": f"{topology.model_type} {topology.model}",
        "routes": routes,
        **settings.protocol(),
    }
    return [checked({**row.as_dict(), **common}, "this comparison") for row in figures]


def checked(entry: Mapping[str, Any], where: str) -> Entry:
    """The entry with every field. Raises ValueError, saying which field is wrong."""
    if unknown := sorted(set(entry) - set(FIELDS)):
        raise ValueError(f"{where}: unknown fields {', '.join(unknown)}")
    if lacking := [name for name in REQUIRED if entry.get(name) is None]:
        raise ValueError(f"{where}: it lacks {', '.join(lacking)}")
    for name in TEXT:
        if not isinstance(entry[name], str) or not entry[name]:
            raise ValueError(f"{where}: {name} is {entry[name]!r}, not text")
    for name in FIELDS[len(TEXT) :]:
        value = entry.get(name)
        if value is not None:
            _check_number(name, value, where)
    return {name: entry.get(name) for name in FIELDS}


def _check_number(name: str, value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {name} is {value!r}, not a number")
    if name in COUNTS and (not isinstance(value, int) or value < 0):
        raise ValueError(f"{where}: {name} is {value!r}, not a count")
    if name in (*SHARES, *OPTIONAL_SHARES) and not -TOLERANCE <= value <= 1 + TOLERANCE:
        raise ValueError(f"{where}: {name} is {value!r}, not between 0 and 1")
    if name in AMOUNTS and value < 0:
        raise ValueError(f"{where}: {name} is {value!r}, below 0")


def read_board(path: Path, *, new: bool = False) -> list[Entry]:
    """The entries of a leaderboard, checked. new: a file that is not there has none.

    Raises ValueError, naming the file and the entry.
    """
    if path.suffix not in (".json", ".csv"):
        raise ValueError(f"{path}: a leaderboard is a .json or a .csv file")
    if not path.exists():
        if new:
            return []
        raise ValueError(f"{path}: there is no such leaderboard")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error})") from error
    found = _from_csv(text, path) if path.suffix == ".csv" else _from_json(text, path)
    return with_entries([], found, str(path))


def _from_json(text: str, path: Path) -> list[Entry]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise ValueError(f"{path} is no leaderboard: its kind is not {KIND!r}")
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {data.get('schema')!r}; this version reads {SCHEMA}")
    entries = data.get("entries")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: its entries are no list of objects")
    return [checked(entry, f"{path}, entry {n}") for n, entry in enumerate(entries, 1)]


def _from_csv(text: str, path: Path) -> list[Entry]:
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        return [
            checked(_typed(row, f"{path}, line {rows.line_num}"), f"{path}, line {rows.line_num}")
            for row in rows
        ]
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error


def _typed(row: Mapping[str | None, Any], where: str) -> Entry:
    """The cells as text, counts and numbers; an empty cell is none."""
    if None in row or None in row.values():
        raise ValueError(f"{where}: it has not as many cells as the header")
    values: Entry = {}
    for name, cell in row.items():
        assert name is not None
        if not cell:
            values[name] = None
            continue
        try:
            values[name] = cell if name in TEXT else int(cell) if name in COUNTS else float(cell)
        except ValueError:
            raise ValueError(f"{where}: {name} is {cell!r}, not a number") from None
    return values


def with_entries(board: Sequence[Entry], entries: Iterable[Entry], where: str) -> list[Entry]:
    """The board with more entries. Raises ValueError for those that contradict it.

    where: their source, for messages. Nothing hits more often than the optimum that may stream
    experts through, on the same routes by the same protocol.
    """
    merged = {(*_key(entry), entry["by"]): entry for entry in board}
    figures = {_key(entry): entry for entry in board}
    for entry in entries:
        other = figures.get(_key(entry))
        if other is not None and other["by"] != entry["by"] and _differ(entry, other):
            raise ValueError(
                f"{where}: {_name(entry)} hits {entry['hit_rate']:.6f} by {entry['by']}, but "
                f"{other['hit_rate']:.6f} by {other['by']}: one of them ran something else; "
                "name it differently"
            )
        merged[(*_key(entry), entry["by"])] = figures[_key(entry)] = entry
    _require_possible(merged.values(), where)
    return list(merged.values())


def _key(entry: Entry) -> tuple[Any, ...]:
    return tuple(entry[name] for name in KEY)


def _differ(one: Entry, other: Entry) -> bool:
    return abs(one["hit_rate"] - other["hit_rate"]) > TOLERANCE


def _name(entry: Entry) -> str:
    return f"{entry['contender']} at {entry['residency']:.4g} on {entry['label']}"


def _require_possible(entries: Iterable[Entry], where: str) -> None:
    entries = list(entries)
    bounds = {
        tuple(entry[name] for name in TRIAL): entry["hit_rate"]
        for entry in entries
        if entry["contender"] == "belady+bypass" and entry["label"] == "all"
    }
    for entry in entries:
        bound = bounds.get(tuple(entry[name] for name in TRIAL))
        if bound is not None and entry["warm_up"] == 0 and entry["hit_rate"] > bound + TOLERANCE:
            raise ValueError(
                f"{where}: {_name(entry)} hits {entry['hit_rate']:.6f}, above the optimum of these "
                f"routes, {bound:.6f}"
            )


def write_board(path: Path, entries: Sequence[Entry]) -> None:
    """Replace the file, whole or not at all."""
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in entries)
        write_atomically(path, text.getvalue().encode())
        return
    data = {"kind": KIND, "schema": SCHEMA, "entries": list(entries)}
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())
