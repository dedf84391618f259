"""Tables of the results of `python -m benchmarks.rounding`, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common.markdown import table
from benchmarks.common.report import number

Document = dict[str, Any]

POLICIES = {"lru": "LRU", "lfu": "LFU", "predicted": "predicted", "belady": "Belady"}


def quality(document: Document) -> list[str]:
    """The cost of each conversion."""
    first = document["rows"][0]["quality"]
    columns = ("bits a weight", "rounding", "perplexity", "change", "KL, nats", "same greedy token")
    size = f"{first['tokens']:,} tokens"
    return [
        f"{size}, perplexity of the original {first['original_perplexity']:.3f}.",
        "",
        *table(("encoding", *columns), map(_quality, document["rows"])),
    ]


def routes(document: Document) -> list[str]:
    """Hit rates under the routes of each converted model, and what they have in common."""
    replays = document["replays"]
    shown = {one["policy"] for replay in replays for one in replay["hit_rates"]}
    policies = [policy for policy in POLICIES if policy in shown]
    recalls = ["recall, this", "recall, next"] if "predicted" in policies else []
    names = [POLICIES[policy] for policy in policies]
    head = ("routes of", "resident", *names, *recalls, "experts in common")
    return [
        f"{replays[0]['tokens']:,} tokens.",
        "",
        *table(head, (row for one in replays for row in _replay(one, policies))),
    ]


def _quality(row: dict[str, Any]) -> list[str]:
    found = row["quality"]
    return [
        row["encoding"],
        f"{row['bits']:.2f}",
        row["rounding"],
        f"{found['perplexity']:.3f}",
        f"{found['change']:+.2%}",
        f"{found['divergence']:.5f}",
        f"{found['agreement']:.1%}",
    ]


def _replay(replay: dict[str, Any], policies: list[str]) -> Iterator[list[str]]:
    """The rows of one model's routes, one for each cache size."""
    rates = {(one["policy"], one["residency"]): one["hit_rate"] for one in replay["hit_rates"]}
    recalls = [replay["recall_this"], replay["recall_next"]] if "predicted" in policies else []
    for size in dict.fromkeys(size for _, size in rates):
        yield [
            replay["name"],
            f"{size * 100:g} %",
            *(f"{rates[policy, size]:.3f}" for policy in policies),
            *(number(recall, ".3f") for recall in recalls),
            f"{replay['in_common']:.3f}",
        ]
