"""Hit rates of a cache on held-out documents, before and after a predictor was adapted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from predictor.training.rows import Documents
from routing.predictor_file.reader import PredictorFile, open_predictor
from routing.shards import Document
from runtime.cache.belady import Belady
from runtime.cache.forecast import Forecast
from runtime.cache.policies import LIVE_FREE_RULES, POLICIES
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.simulation.comparison import decode_steps, file_forecasts
from runtime.simulation.replay import Simulation, slots_of
from runtime.simulation.trace_steps import TraceStep, document_steps

RESIDENCY = 0.125, 0.25, 0.5
"""Shares of the experts that are resident."""
BEFORE, AFTER = "before", "after"
"""Names of predicted reuse with the one file and with the other."""

HitRates = dict[str, list[float]]
"""Policy -> hit rate for each of RESIDENCY."""


def hit_rates(documents: Documents, before: Path, after: Path, *, max_tokens: int) -> HitRates:
    """Hit rates over the first tokens of `documents`, decoded one by one with one cache."""
    files = {BEFORE: open_predictor(before), AFTER: open_predictor(after)}
    steps = _steps(documents, files[BEFORE], max_tokens)
    forecasts: dict[str, Sequence[Forecast | None]] = {
        name: list(file_forecasts(file, steps)) for name, file in files.items()
    }
    found: HitRates = {}
    for share in RESIDENCY:
        for name, simulation in _simulations(files, steps, share).items():
            nothing = [None] * len(decode_steps(steps))
            told = forecasts.get(name, nothing)
            for forecast, step in zip(told, decode_steps(steps), strict=True):
                simulation.step(forecast, list(step.calls()))
            found.setdefault(name, []).append(1 - simulation.loads / simulation.requests)
    return found


def _simulations(
    files: dict[str, PredictorFile], steps: list[list[TraceStep]], share: float
) -> dict[str, Simulation]:
    stack = files[BEFORE].stack
    shape = stack.num_layers, stack.num_experts
    slots = slots_of(share, shape)
    calls = [call for step in decode_steps(steps) for call in step.calls()]
    policies: dict[str, Policy] = {name: POLICIES[name](*shape) for name in LIVE_FREE_RULES}
    policies[Belady.name] = Belady(*shape, calls=calls)
    for name, file in files.items():
        policies[name] = PredictedReuse(*shape, horizon=file.horizon)
    return {name: Simulation(policy, *shape, slots) for name, policy in policies.items()}


def _steps(documents: Documents, file: PredictorFile, max_tokens: int) -> list[list[TraceStep]]:
    """The steps of each document, a token each, until there are `max_tokens`."""
    found: list[list[TraceStep]] = []
    for document in documents:
        left = max_tokens - sum(map(len, found))
        if left <= 0:
            break
        cut = Document(
            document.token_ids_T[:left],
            document.experts_TLK[:left],
            document.phase_T[:left],
            document.label,
        )
        found.append(list(document_steps(cut, file.stack.num_experts, decode_all=True)))
    return found
