"""Tables of the results of `python -m benchmarks.cache.kinds`, in Markdown.

A document is what that command wrote. Groups of kinds are in a file like docs/results/kinds.json:
`groups` has sets of them by name, each of which gives a group's kinds by its title; `scripts` has
the script of each kind. The best free rule is that of each kind and cache size, in hindsight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from benchmarks.common.markdown import percent, table
from runtime.simulation.gap import best_free_rule, gap_closed

MEAN = "mean"
TOLERANCE = 0.003
"""Hit rate by which predicted reuse may lie below a free rule and still count as good as it."""

Document = dict[str, Any]
HitRates = dict[str, float]
"""Hit rates by policy."""


def each_kind(document: Document, *, residency: str) -> Iterator[str]:
    """Every rule on every kind at one cache size, then their mean."""
    return by_kind([row for row in document["rows"] if row["residency"] == float(residency)])


def by_kind(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table of one cache size: a row for each kind, then their mean."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    kinds = {kind: rates for (kind, _), rates in _hit_rates(rows).items()}
    kinds[MEAN] = _mean(list(kinds.values()))
    gaps = ["gap of LRU", "gap of best free"] if "predicted" in policies else []
    return table(
        ["kind", *policies, "best free", *gaps],
        (
            [kind, *(f"{rates[policy]:.3f}" for policy in policies), _best(rates)]
            + [_gap(rates, floor) for floor in ("lru", _best(rates))[: len(gaps)]]
            for kind, rates in kinds.items()
        ),
    )


def by_group(
    document: Document, kinds: Document, *, groups: str, policies: str = ""
) -> Iterator[str]:
    """Mean hit rates of groups of kinds at each cache size.

    policies: the columns, separated by commas; all policies where none is named.
    """
    found = _hit_rates(document["rows"])
    shown = policies.split(",") if policies else _policies(found)
    rows = []
    for title, members in _group(kinds, groups).items():
        for size in dict.fromkeys(size for _, size in found):
            cells = [found[kind, size] for kind in members if (kind, size) in found]
            if cells:
                name = f"{title} ({len(cells)})"
                rows.append([name, f"{size * 100:g} %", *_means(cells, shown)])
    return table(["kinds", "resident", *_columns(found, shown)], rows)


def hit_rates(document: Document, *, policies: str = "") -> Iterator[str]:
    """Hit rates of one run at each cache size.

    document: what `runtime.simulate --json`, `benchmarks.cache.live` or the demo wrote.
    policies: the columns, separated by commas; all policies where none is named.
    """
    rows = document["results"] if "results" in document else document["runs"]
    found = _hit_rates([row | {"kind": ""} for row in rows])
    shown = policies.split(",") if policies else _policies(found)
    return table(
        ["resident", *_columns(found, shown)],
        ([f"{size * 100:g} %", *_means([rates], shown)] for (_, size), rates in found.items()),
    )


def overview(*documents: Document, groups: str, after: str) -> Iterator[str]:
    """Predicted reuse against the best free rule, a row for each document and group of kinds.

    documents: those of `benchmarks.cache.kinds`, then that of the kinds.
    after: text in the names of the files that stands before what the table calls them.
    """
    *results, kinds = documents
    sizes = sorted({row["residency"] for document in results for row in document["rows"]})
    closed = [f"gap closed, {size * 100:g} %" for size in sizes]
    head = ["model", "kinds", *closed, "mean", "cells below", "least lead"]
    return table(
        head,
        (
            [document["file"].partition(after)[2], title, *_judged(document, members, sizes)]
            for document in results
            for title, members in _group(kinds, groups).items()
            if any(row["kind"] in members for row in document["rows"])
        ),
    )


def live_counts(*documents: Document, after: str) -> Iterator[str]:
    """Live runs against the simulation of the same routes, a row for each document.

    after: text in the names of the files that stands before what the table calls them.
    """
    head = ["model", "kinds", "live runs", "loads as simulated", "tokens as without offloading"]
    return table(
        head,
        ([document["file"].partition(after)[2], *_agreeing(document)] for document in documents),
    )


def leads(document: Document, kinds: Document, *, groups: str, only: str = "") -> Iterator[str]:
    """Each kind's best free rule, predicted reuse and Belady, at each cache size.

    only: the title of one group, whose kinds alone are shown; all kinds where none is named.
    """
    found = _hit_rates(document["rows"])
    titles = {kind: title for title, own in _group(kinds, groups).items() for kind in own}
    sizes = sorted({size for _, size in found})
    shown = [kind for kind in sorted({kind for kind, _ in found}) if only in ("", titles[kind])]
    columns = {"kind": shown, "script": [kinds["scripts"][kind] for kind in shown]}
    if not only:
        columns = {"kind": shown, "text": [titles[kind] for kind in shown]} | columns
    cells = {f"{size * 100:g} %": [_lead(found[kind, size]) for kind in shown] for size in sizes}
    return table([*columns, *cells], zip(*columns.values(), *cells.values(), strict=True))


def winners(document: Document) -> Iterator[str]:
    """The number of kinds in which each rule was the best of the free ones."""
    found = _hit_rates(document["rows"])
    sizes = sorted({size for _, size in found})
    won = {size: Counter(_best(found[key]) for key in found if key[1] == size) for size in sizes}
    rules = dict.fromkeys(rule for size in sizes for rule, _ in won[size].most_common())
    return table(
        ["kinds in which it was the best free rule", *rules],
        ([f"{size * 100:g} %", *(str(won[size][rule]) for rule in rules)] for size in sizes),
    )


def _hit_rates(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, float], HitRates]:
    """Hit rates by kind and cache size; sizes in order."""
    found: dict[tuple[str, float], HitRates] = {}
    for row in sorted(rows, key=lambda row: row["residency"]):
        rates = found.setdefault((row["kind"], row["residency"]), {})
        hits = row["hit_rate"] if "hit_rate" in row else 1 - row["loads"] / row["requests"]
        rates[row["policy"]] = hits
    return found


def _policies(found: dict[tuple[str, float], HitRates]) -> list[str]:
    return list(dict.fromkeys(policy for rates in found.values() for policy in rates))


def _columns(found: dict[tuple[str, float], HitRates], shown: Sequence[str]) -> list[str]:
    """The heads of the cells that `_means` makes."""
    gaps = ["gap of LRU", "gap of best free"] if "predicted" in _policies(found) else []
    return [*shown, "best free", *gaps]


def _means(cells: Sequence[HitRates], shown: Sequence[str]) -> list[str]:
    """Mean hit rates of the policies and of the best free rules, and the gaps closed."""
    mean = _mean(cells)
    gaps = [_gap(mean, "lru"), percent(_gap_of_mean(cells))] if "predicted" in mean else []
    return [*(f"{mean[policy]:.3f}" for policy in shown), f"{_mean_best(cells):.3f}", *gaps]


def _group(kinds: Document, name: str) -> dict[str, list[str]]:
    """The kinds of each group of a set, by title."""
    sets: dict[str, dict[str, list[str]]] = kinds["groups"]
    if name not in sets:
        raise ValueError(f"there are no groups {name!r} of kinds; there are {', '.join(sets)}")
    return sets[name]


def _judged(document: Document, members: Sequence[str], sizes: Sequence[float]) -> list[str]:
    """The gap closed at each size and their mean, cells below the best free rule, least lead."""
    found = {key: rates for key, rates in _hit_rates(document["rows"]).items() if key[0] in members}
    gaps = [_gap_of_mean([found[key] for key in found if key[1] == size]) for size in sizes]
    lead = {key: rates["predicted"] - rates[_best(rates)] for key, rates in found.items()}
    kind, size = least = min(lead, key=lambda key: lead[key])
    return [
        *map(percent, [*gaps, fmean(gaps)]),
        f"{sum(value < -TOLERANCE for value in lead.values())} of {len(lead)}",
        f"{lead[least]:+.3f}, {kind} at {size * 100:g} %",
    ]


def _agreeing(document: Document) -> list[str]:
    """Kinds, live runs, and those that agree in loads and in tokens."""
    live = [row for row in document["rows"] if row.get("live")]
    return [str(n) for n in (len({row["kind"] for row in live}), len(live), *agreeing(live))]


def agreeing(live: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """How many live rows load what their simulation loads, and have the tokens of the model
    without offloading.
    """
    loads = sum(row["loads"] == row["simulated_loads"] for row in live)
    return loads, sum(row["identical"] for row in live)


def _gap_of_mean(cells: Sequence[HitRates]) -> float:
    """The share of the gap from the best free rules to Belady that predicted reuse closes."""
    if not cells:
        return math.nan
    mean = _mean(cells)
    return gap_closed(mean["predicted"], _mean_best(cells), mean["belady"])


def _lead(rates: HitRates) -> str:
    best = _best(rates)
    return f"{rates[best]:.3f} ({best}), {rates['predicted']:.3f}, {rates['belady']:.3f}"


def _mean(cells: Sequence[HitRates]) -> HitRates:
    return {policy: fmean(rates[policy] for rates in cells) for policy in cells[0]}


def _mean_best(cells: Sequence[HitRates]) -> float:
    return fmean(rates[_best(rates)] for rates in cells)


def _best(rates: HitRates) -> str:
    best = best_free_rule(rates)
    assert best is not None
    return best


def _gap(rates: HitRates, floor: str) -> str:
    return percent(gap_closed(rates["predicted"], rates[floor], rates["belady"]))
