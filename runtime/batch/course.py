"""The course of a batch: its speed, hit rate and bytes while it ran, drawn at its end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

PARTS = 60
"""Points of a line at most: each the mean of a part of the run."""


class Moment(NamedTuple):
    """Counts since the beginning, at the end of a request."""

    seconds: float
    tokens: int
    """Of prompts and answers that have ended."""
    hit_rate: float
    bytes_loaded: int


def draw_course(moments: Sequence[Moment], title: str, path: Path) -> None:
    """Draw speed, hit rate and bytes a token over the time of the run into an image file.

    A batch of which nothing was served has empty panels.
    """
    from matplotlib.figure import Figure

    parts = list(pairwise([Moment(0.0, 0, float("nan"), 0), *thinned(moments)]))
    ends = [after.seconds for _, after in parts]
    figure = Figure(figsize=(8, 6), layout="constrained")
    speed, rate, moved = figure.subplots(3, 1, sharex=True)
    speed.step(ends, [tokens_per_s(*part) for part in parts], where="pre", color="#3b6ea5")
    rate.plot(ends, [100 * after.hit_rate for _, after in parts], color="#4f8a5b")
    moved.step(ends, [mb_per_token(*part) for part in parts], where="pre", color="#d9822b")
    speed.set(ylabel="tokens / s", ylim=(0, None))
    rate.set(ylabel="hit rate so far, %", ylim=(0, 100))
    moved.set(ylabel="MB moved / token", ylim=(0, None), xlabel="seconds since the first request")
    for axes in (speed, rate, moved):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130, facecolor="white")


def thinned(moments: Sequence[Moment]) -> list[Moment]:
    """At most PARTS of them, at even distances in time, the last one among them."""
    chosen: list[Moment] = []
    for moment in moments:
        if not chosen or moment.seconds - chosen[-1].seconds >= moments[-1].seconds / PARTS:
            chosen.append(moment)
    if chosen and chosen[-1] != moments[-1]:
        chosen[-1] = moments[-1]
    return chosen


def tokens_per_s(before: Moment, after: Moment) -> float:
    """The speed between two moments."""
    return (after.tokens - before.tokens) / max(after.seconds - before.seconds, 1e-9)


def mb_per_token(before: Moment, after: Moment) -> float:
    """Megabytes of experts for each token between two moments."""
    moved = after.bytes_loaded - before.bytes_loaded
    return moved / 1e6 / max(after.tokens - before.tokens, 1)
