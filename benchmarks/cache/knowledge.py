"""Worth to the cache of knowing the future, and of each part of the reuse formula.

    python -m benchmarks.cache.knowledge --trace VALIDATION_TRACE --predictor predictor.onnx

Replays a trace token by token under predicted reuse, with some of the predictor's heads replaced by
the truth, and with the formula changed. Each figure is the share closed of the gap between the
expert loads of LRU and those of Belady without bypass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from routing.cli import run
from routing.predictor_file.format import FAR
from routing.predictor_file.reader import open_predictor
from routing.shards import TraceReader
from runtime.cache.belady import Belady, Calls
from runtime.cache.forecast import Forecast
from runtime.cache.policies import LRU
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.simulation.baselines import answers, used_by
from runtime.simulation.comparison import file_forecasts
from runtime.simulation.replay import BypassSimulation, Simulation, slots_of
from runtime.simulation.trace_steps import document_steps, sample_documents


@dataclass(frozen=True, kw_only=True)
class KnowledgeSettings:
    """Replace predictions by the truth, one at a time."""

    trace: Path
    """Trace directory."""
    predictor: Path
    """ONNX predictor of that model."""
    residency: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5])
    """Cache sizes, as fractions of all experts."""
    max_tokens: int = 4608
    """Tokens to replay in all."""
    document_tokens: int = 256
    """Most tokens to replay of one document."""


class Variant(NamedTuple):
    """One line of the table."""

    name: str
    forecasts: Sequence[Forecast]
    policy: Callable[[], Policy]
    bypass: bool = False


def known(forecasts: Sequence[Forecast], truth: Sequence[Forecast], *heads: str) -> list[Forecast]:
    """The forecasts with some heads replaced by the truth."""
    return [
        said._replace(**{head: getattr(true, head) for head in heads})
        for said, true in zip(forecasts, truth, strict=True)
    ]


def discounted(discount: float, memory: float, horizon: int, shape: tuple[int, int]) -> Policy:
    """Predicted reuse with other constants."""
    members = {"DISCOUNT": discount, "MEMORY": memory}
    changed: type[PredictedReuse] = type("Changed", (PredictedReuse,), members)
    return changed(*shape, horizon=horizon)


def variants(
    said: list[Forecast], truth: list[Forecast], horizon: int, shape: tuple[int, int]
) -> Iterator[Variant]:
    """All lines: heads replaced by the truth, no far head, other constants."""
    plain = partial(PredictedReuse, *shape, horizon=horizon)
    yield Variant("as predicted", said, plain)
    yield Variant("as predicted, with bypass", said, plain, bypass=True)
    for heads in (
        ("this_LE",),
        ("next_LE",),
        ("next_LE", "horizon_LE"),
        ("next_LE", "horizon_LE", "far_LE"),
    ):
        names = ", ".join(head.removesuffix("_LE") for head in heads)
        yield Variant(f"known: {names}", known(said, truth, *heads), plain)
    alike = [f._replace(far_LE=1 - (1 - f.horizon_LE) ** FAR) for f in said]
    yield Variant("no head for the far horizon", alike, plain)
    usual = PredictedReuse.DISCOUNT, PredictedReuse.MEMORY
    for discount in (0.7, 0.8, 0.9, 0.95):
        policy = partial(discounted, discount, usual[1], horizon, shape)
        yield Variant(f"discount {discount} instead of {usual[0]}", said, policy)
    for memory in (0.9, 0.995):
        policy = partial(discounted, usual[0], memory, horizon, shape)
        yield Variant(f"memory {memory} instead of {usual[1]}", said, policy)


def loads(variant: Variant, calls: Sequence[Calls], shape: tuple[int, int], share: float) -> int:
    """Experts loaded at one cache size."""
    kind = BypassSimulation if variant.bypass else Simulation
    simulation = kind(variant.policy(), *shape, slots_of(share, shape))
    for forecast, called in zip(variant.forecasts, calls, strict=True):
        simulation.step(forecast, called)
    return simulation.loads


def main(settings: KnowledgeSettings) -> None:
    """Print one line for each variant."""
    reader, file = TraceReader(settings.trace), open_predictor(settings.predictor)
    reader.topology.require_match(file.topology, ours="the trace", theirs="the predictor")
    shape = reader.stack.num_layers, reader.stack.num_experts
    chosen = sample_documents(
        reader, max_tokens=settings.max_tokens, document_tokens=settings.document_tokens
    )
    documents = [list(document_steps(d, shape[1], decode_all=True)) for d in chosen]
    said = list(file_forecasts(file, documents))
    truth = [
        Forecast(*(plane.astype(np.float32) for plane in planes))
        for steps in documents
        for planes in zip(*answers(used_by(steps, shape[1]), file.horizon), strict=True)
    ]
    calls = [list(step.calls()) for steps in documents for step in steps]
    flat = [call for step in calls for call in step]
    bounds = [
        Variant("lru", said, partial(LRU, *shape)),
        Variant("belady", said, partial(Belady, *shape, calls=flat)),
    ]
    ends = {s: [loads(end, calls, shape, s) for end in bounds] for s in settings.residency}
    print(f"{len(calls)} tokens of {len(documents)} documents; share of the LRU-Belady gap closed")
    for variant in variants(said, truth, file.horizon, shape):
        closed = [
            (worst - loads(variant, calls, shape, s)) / (worst - best)
            for s, (worst, best) in ends.items()
        ]
        cells = "  ".join(f"{s:.4g}: {c:.3f}" for s, c in zip(ends, closed, strict=True))
        print(f"{variant.name:40} {cells}", flush=True)


if __name__ == "__main__":
    run(main, KnowledgeSettings, prog="python -m benchmarks.cache.knowledge")
