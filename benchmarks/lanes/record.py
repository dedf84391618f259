"""Recording of one decode step or one prompt as lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from benchmarks.lanes.kinds import GPU
from benchmarks.lanes.lanes import Fetches, Lanes, build_lanes
from benchmarks.lanes.profile import Profile
from benchmarks.lanes.recorder import Mark, Recorder

Generate = Callable[[Callable[[], None]], object]
"""Generates a few tokens, and calls what it is given at each token's arrival."""


class Step(NamedTuple):
    """A step between two moments on the recorder's clock, and the counts before and after it."""

    start: float
    end: float
    before: Mark
    after: Mark


def record_step(
    generate: Generate, stats: Any, device: torch.device, bandwidth: float | None
) -> Lanes:
    """Lanes of the decode step of median time, out of the second half of those recorded.

    bandwidth: of the link, in bytes a second; None without a link.
    Raises ValueError where `generate` gives fewer than two tokens, or the profile lacks them.
    """
    recorder = Recorder(stats, device)
    with recorder.recording():
        recorder.mark()
        generate(recorder.mark)
    step = median_step(steps_of(recorder.profile, recorder.marks))
    return _lanes(recorder, step, device, bandwidth)


def record_prompt(
    warm_up: Callable[[], object], generate: Generate, stats: Any, device: torch.device
) -> Lanes:
    """Lanes of one prompt, from the call of `generate` to the first token.

    warm_up: runs another prompt first, since what is profiled for the first time is slow.
    Raises ValueError where the profile lacks the prompt.
    """
    recorder = Recorder(stats, device)
    with recorder.recording():
        warm_up()
        recorder.mark()
        generate(recorder.mark)
    before, after, *_ = recorder.marks
    return _lanes(recorder, Step(before.at, after.at, before, after), device, bandwidth=None)


def steps_of(profile: Profile, marks: Sequence[Mark]) -> list[Step]:
    """The decode steps after the first token, marks[1].

    A captured step lasts until the next one's first kernel begins; any other from token to token.
    """
    after_prompt = marks[1:]
    pairs = list(pairwise(after_prompt))
    if not profile.graphs:
        return [Step(before.at, after.at, before, after) for before, after in pairs]
    windows = zip(pairwise(profile.graphs), pairs, strict=False)
    return [
        Step(start, end, *pair)
        for (start, end), pair in windows
        if start is not None and end is not None
    ]


def median_step(steps: Sequence[Step]) -> Step:
    """The step of median time in the second half, where caches and clocks have settled."""
    if not steps:
        raise ValueError("no whole decode step was recorded")
    settled = sorted(steps[len(steps) // 2 :], key=lambda step: step.end - step.start)
    return settled[len(settled) // 2]


def _lanes(recorder: Recorder, step: Step, device: torch.device, bandwidth: float | None) -> Lanes:
    fetches = Fetches()
    if bandwidth is not None:
        fetched = step.after.fetched_bytes - step.before.fetched_bytes
        missed_L = (step.after.missed_L - step.before.missed_L).tolist()
        fetches = Fetches(fetched / bandwidth * 1e6, missed_L)
    on_gpu = device.type == "cuda"
    lanes = build_lanes(
        recorder.profile, recorder.times, step.start, step.end, fetches=fetches, on_gpu=on_gpu
    )
    if on_gpu and not (lanes.busy_us[GPU] and recorder.profile.waits):
        raise ValueError("the profile holds no GPU work, or no wait of the host, of that time")
    return lanes
