"""Tables of results of commands outside of the benchmarks, and of measurements made once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common.markdown import table

Document = dict[str, Any]


def contenders(document: Document) -> Iterator[str]:
    """Hit rates of `runtime.simulate --all`, and the modelled time of a token.

    The time is that with priced prefetching, or without any for those that foresee nothing.
    """
    results = document["results"]
    found = {(one["name"], one["residency"]): one for one in results}
    sizes = list(dict.fromkeys(size for _, size in found))
    return table(
        ("", *(f"{size * 100:g} %" for size in sizes)),
        (
            (name, *(_timed(found[name, size]) for size in sizes))
            for name in dict.fromkeys(name for name, _ in found)
        ),
    )


def corpus(document: Document, *, role: str) -> Iterator[str]:
    """The kinds of text of one role, with the packages that they are taken from."""
    return table(
        ("kind", "script", "MB", "documents, held out", "packages"),
        (
            (
                kind,
                one["script"],
                f"{one['bytes'] / 1e6:.1f}",
                f"{one['documents']}, {one['held_out_documents']}",
                ", ".join(dict.fromkeys(part["package"].split()[1] for part in one["sources"])),
            )
            for kind, one in document[role].items()
        ),
    )


def recall(*documents: Document, head: str, after: str) -> Iterator[str]:
    """Recall and calibration of the predictors of `predictor.evaluate`, means over the layers.

    head: `this`, `next`, `horizon` or `far`.
    after: text in the names of the files that stands before what the table calls their text.
    """
    figures = ("recall", "recall_1_5k", "calibration_error")
    return table(
        ("text", "predictor", "recall@K", "recall@1.5K", "calibration error"),
        (
            (
                document["file"].partition(after)[2].replace("-", " "),
                _contender(one),
                *(f"{one['heads'][head][figure]['mean']:.3f}" for figure in figures),
            )
            for document in documents
            for one in document["predictors"]
        ),
    )


def _contender(one: Document) -> str:
    """A predictor's name, and whether it knew the routes before, if it reads any."""
    name, history = str(one["name"]), one["history"]
    return name if history == "unused" else f"{name}, history {history}"


def attention_repeats(document: Document) -> Iterator[str]:
    """Repeats of the same steps whose logits differ from the first run's."""
    return table(
        ("steps", "repeats", "repeats whose logits differ from the first run's"),
        (
            (name, str(len(repeats)), str(sum(map(bool, repeats))))
            for name, repeats in document["repeats"].items()
            if name != "what"
        ),
    )


def attention_times(document: Document) -> Iterator[str]:
    """Microseconds of a call of attention."""
    rows = document["scaled_dot_product_attention"]["rows"]
    return table(rows[0], ([str(value) for value in row.values()] for row in rows))


def _timed(one: dict[str, Any]) -> str:
    times = one["ms_per_token"]
    time = f"{times['priced']:.2f}" if "priced" in times else f"{times['none']:.2f} without"
    return f"{one['hit_rate']:.3f} ({time})"
