"""The requests of the throughput benchmark: passages of a trace, or random tokens.

Without a trace, routes are drawn with a stated locality (`benchmarks.replay.drawn_routes`) as a few
long streams; each request takes the routes of a window of one, which begins anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from benchmarks.common.shapes import Shape, empty_model
from benchmarks.replay.drawn_routes import draw_routes, drawn_hit_rate, fit_steepness
from benchmarks.replay.recorded_requests import Recorded, num_passages, recorded_requests
from benchmarks.throughput.settings import ThroughputSettings
from routing.inspect_model import topology_of
from routing.topology import Stack
from runtime.serving.request import Request

STREAMS, WINDOWS = 8, 2
"""Streams of drawn routes, and how many windows of the longest request each is long."""


class Load(NamedTuple):
    """Requests, and the tokens and routes of each by its id."""

    requests: list[Request]
    recorded: dict[str, Recorded]
    routes: str
    """Where the routes are from."""


def load_of(settings: ThroughputSettings, shape: Shape) -> Load:
    """The requests of all arms. Raises ValueError for a trace without passages long enough."""
    if settings.trace is not None:
        return traced(settings)
    topology = topology_of(empty_model(shape))
    return drawn(settings, topology.stack(), topology.vocab_size)


def traced(settings: ThroughputSettings) -> Load:
    """Passages of a trace; they come again where it has fewer than the requests."""
    assert settings.trace is not None
    count = min(settings.requests, num_passages(settings.trace, context_of(settings)))
    some, recorded = recorded_requests(
        settings.trace, max(count, 1), prompt_tokens=settings.prompt_tokens,
        output_tokens=[settings.least_tokens or settings.tokens, settings.tokens],
        seed=settings.seed,
    )  # fmt: skip
    requests = [
        replace(some[number % count], id=f"{number}") for number in range(settings.requests)
    ]
    ids = {f"{number}": some[number % count].id for number in range(settings.requests)}
    routes = f"replayed from a trace, {count:,} passages"
    return Load(requests, {id: recorded[of] for id, of in ids.items()}, routes)


def drawn(settings: ThroughputSettings, stack: Stack, vocab_size: int) -> Load:
    """Random tokens with drawn routes."""
    random = np.random.default_rng(settings.seed)
    steepness = fit_steepness(stack, settings.locality)
    streams = _streams(settings, stack, steepness)
    requests: list[Request] = []
    recorded: dict[str, Recorded] = {}
    for number in range(settings.requests):
        low, high = settings.prompt_tokens
        prompt = int(random.integers(low, high + 1))
        least = settings.least_tokens or settings.tokens
        new = int(random.integers(least, settings.tokens + 1))
        tokens_T = random.integers(0, vocab_size, prompt + new).astype(np.int32)
        stream_TLK = streams[number % STREAMS]
        start = int(random.integers(len(stream_TLK) - len(tokens_T) + 1))
        recorded[f"{number}"] = Recorded(tokens_T, stream_TLK[start : start + len(tokens_T)])
        requests.append(
            Request(
                id=f"{number}", prompt=tokens_T[:prompt].tolist(), ignore_eos=True,
                max_tokens=new,
            )
        )  # fmt: skip
    reached = drawn_hit_rate(stack, steepness, seed=settings.seed + STREAMS)
    return Load(requests, recorded, f"drawn, LRU hits {reached:.3f} at a quarter")


def _streams(settings: ThroughputSettings, stack: Stack, steepness: float) -> Sequence[np.ndarray]:
    length = WINDOWS * context_of(settings)
    return [
        draw_routes(stack, steepness, length, settings.seed + number).astype(np.int16)
        for number in range(STREAMS)
    ]


def context_of(settings: ThroughputSettings) -> int:
    """Tokens of the longest sequence."""
    return settings.prompt_tokens[1] + settings.tokens
