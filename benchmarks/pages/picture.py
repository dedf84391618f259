"""The README's picture, drawn from JSON files of docs/results.

python -m benchmarks.pages.picture     # after new figures: docs/images/results.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.pages.__main__ import RESULTS, ROOT
from routing.cli import run
from runtime.cache.policies import FREE_RULES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATES = "2026-11-29-online-value-moe-16x64.json"
SPEEDS = ("2026-11-29-cpu-share-h200.json", "2026-11-29-encodings-olmoe-attention-h200.json")
SHARES = {"0.1": "a tenth", "0.25": "a quarter", "1.0": "all"}
INK, GREY, BLUE, GREEN, ORANGE = "#17202b", "#8c8c8c", "#1273de", "#4f8a5b", "#e8730c"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Draw hit rates and decoding speeds of docs/results as one picture."""

    out: Path = ROOT / "docs" / "images" / "results.png"
    """Image file to write."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One sequence's decoding speed, and the memory that it took."""

    label: str
    shares_work: bool
    """Whether the CPU computed a part of the missed experts."""
    gib: float
    """Peak GPU memory."""
    tokens_per_s: float


def hit_rates(document: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    """By line of the picture, cache size -> hit rate over all kinds of text.

    The best free rule is the best at each size.
    """
    counts: dict[tuple[str, float], list[int]] = {}
    for row in document["rows"]:
        total = counts.setdefault((row["policy"], row["residency"]), [0, 0])
        total[0] += row["loads"]
        total[1] += row["requests"]
    rates = {key: 1 - loads / requests for key, (loads, requests) in counts.items()}
    sizes = sorted({size for _, size in rates})
    best = {size: max(rates[r, size] for r in FREE_RULES if (r, size) in rates) for size in sizes}
    names = {"Belady, which knows the future": "belady", "predicted": "predicted", "LRU": "lru"}
    lines = {label: {s: rates[name, s] for s in sizes} for label, name in names.items()}
    return lines | {"best rule without a predictor": best}


def speeds(documents: Sequence[Mapping[str, Any]]) -> list[Speed]:
    """The compiled arms of one sequence over recorded routes."""
    rows = [row for document in documents for row in document["rows"]]
    return [
        Speed(
            label=f"{row['encoding'] or 'bf16'}, {SHARES[row['residency']]}",
            shares_work="cpu" in row["name"].split(),
            gib=row["peak_bytes"] / GIB,
            tokens_per_s=row["tokens_per_s"],
        )
        for row in rows
        if row["error"] is None and row["compile"] and row["batch"] == 1
    ]


def draw(rates: Mapping[str, Mapping[float, float]], points: Sequence[Speed], out: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_rates(left, rates)
    _draw_speeds(right, points)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130, facecolor="white")


def _draw_rates(axes: Axes, rates: Mapping[str, Mapping[float, float]]) -> None:
    styles = {"Belady, which knows the future": (GREEN, "--"), "predicted": (BLUE, "-"),
              "best rule without a predictor": (INK, ":"), "LRU": (GREY, "-")}  # fmt: skip
    for name, (color, style) in styles.items():
        sizes, values = zip(*sorted(rates[name].items()), strict=True)
        axes.plot([100 * s for s in sizes], [100 * v for v in values], style, color=color,
                  marker="o", markersize=4, label=name)  # fmt: skip
    axes.set_xticks([100 * size for size in sorted(rates["predicted"])])
    axes.xaxis.set_major_formatter(lambda percent, _: f"{percent:g} %")
    axes.yaxis.set_major_formatter(lambda percent, _: f"{percent:g} %")
    axes.set(xlabel="experts in slots, of all", ylabel="hit rate", ylim=(0, 100))
    axes.set_title("moe-16x64, 30 kinds of text: experts found in a slot", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_speeds(axes: Axes, points: Sequence[Speed]) -> None:
    looks = ((False, BLUE, "o", "GPU"), (True, ORANGE, "^", "GPU, and the CPU beside it"))
    for shares, color, marker, name in looks:
        chosen = [point for point in points if point.shares_work is shares]
        axes.plot([p.gib for p in chosen], [p.tokens_per_s for p in chosen], marker, color=color,
                  label=name)  # fmt: skip
        for point in chosen:
            axes.annotate(
                f"{point.label}: {point.tokens_per_s:.0f}", (point.gib, point.tokens_per_s),
                xytext=(7, -3), textcoords="offset points", fontsize=7, color=INK,
            )  # fmt: skip
    axes.set(xlabel="peak GPU memory, GiB", ylabel="tokens / s, one sequence (log scale)")
    axes.set(xlim=(1, 5.6), ylim=(40, 1300), yscale="log")
    axes.set_yticks([50, 100, 200, 500, 1000], ["50", "100", "200", "500", "1,000"])
    axes.set_yticks([], minor=True)
    axes.set_title("olmoe-7b (12.9 GiB in bf16), one H200: experts in slots", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def main(settings: PictureSettings) -> None:
    """Draw the picture."""
    rates = hit_rates(json.loads((RESULTS / RATES).read_text()))
    points = speeds([json.loads((RESULTS / name).read_text()) for name in SPEEDS])
    draw(rates, points, settings.out)
    print(f"picture: {settings.out}")


if __name__ == "__main__":
    run(main, PictureSettings, prog="python -m benchmarks.pages.picture", examples=["--out a.png"])
