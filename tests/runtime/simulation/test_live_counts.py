"""Live runs and simulations of the same tokens: equal hits, misses and loads, whatever the text.

Documents are any tokens, in steps of any length; the routes that the model without offloading took
are what is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import runtime
from exports.comparison import RecordedRoutes, calls_of, record_routes
from routing.inspect_model import topology_of
from routing.predictor_file.reader import open_predictor
from runtime.cache.policies import POLICIES
from runtime.simulation.replay import simulate, slots_of
from runtime.simulation.trace_steps import TraceStep
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.tiny import tiny_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "top-2": ("olmoe", {}),
    "top-1, as in Switch": ("olmoe", {"num_experts_per_tok": 1}),
    "a dense layer between": ("qwen3_moe", {}),
}
RESIDENCY = [0.125, 0.25, 0.5]

Passes = Sequence[Sequence[int]]
"""The forward passes of a document: the token ids of each."""

PASSES = st.lists(st.lists(st.integers(2, 20), min_size=1, max_size=3), min_size=1, max_size=9)
DOCUMENTS = st.lists(PASSES, min_size=1, max_size=2)
REPEATED = [[[token] for token in (5, 9, 5, 9, 7, 5, 9, 5, 9, 7)]] * 2


def run_passes(model: Any, documents: Sequence[Passes]) -> list[int]:
    """Run every document in its passes; returns the greedy choice after each."""
    chosen = []
    for passes in documents:
        cache = None
        for tokens in passes:
            with torch.inference_mode():
                output = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chosen.append(int(output.logits[0, -1].argmax()))
    return chosen


def steps_of(
    documents: Sequence[Passes], routes: RecordedRoutes, num_layers: int
) -> list[TraceStep]:
    """The passes as the simulator's steps. routes: of every experts call, in order."""
    calls = iter(routes)
    steps = []
    for passes in documents:
        edges = [0, *np.cumsum([len(tokens) for tokens in passes]).tolist()]
        for tokens, (start, stop) in zip(passes, pairwise(edges), strict=True):
            experts_TLK = np.stack([next(calls)[1] for _ in range(num_layers)], 1)
            steps.append(
                TraceStep(start == 0, np.array(tokens), np.arange(start, stop), experts_TLK)
            )
    return steps


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("predictors")

    def path(name: str) -> Path:
        target = folder / f"{list(MODELS).index(name)}.onnx"
        kind, sizes = MODELS[name]
        if not target.exists():
            write_predictor(target, topology_of(tiny_model(kind, **sizes)), window=6)
        return target

    return path


@pytest.mark.parametrize("name", MODELS)
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(documents=DOCUMENTS)
@example(documents=REPEATED)
def test_every_live_policy_loads_what_its_simulation_loads(
    name: str, documents: Sequence[Passes], predictor: Callable[[str], Path]
) -> None:
    kind, sizes = MODELS[name]
    model: Any = tiny_model(kind, **sizes)
    stack, routes = topology_of(model).stack(), RecordedRoutes()
    with record_routes(model, routes):
        expected = run_passes(model, documents)
    fit = calls_of(routes)[:8]
    steps = steps_of(documents, routes, stack.num_layers)
    shape = stack.num_layers, stack.num_experts
    file = open_predictor(predictor(name))
    results = simulate(steps, shape, residency=RESIDENCY, predictor=file, fit=fit)
    simulated = {(result.policy, result.residency): result for result in results}
    replays = {"belady": calls_of(routes), "hot-set": fit}
    for policy in POLICIES:
        for share in RESIDENCY:
            live = runtime.load(
                model,
                predictor(name) if policy == "predicted" else None,
                memory=share,
                policy=policy,
                replay=replays.get(policy),
            )
            with live.expertflow as engine:
                assert run_passes(live, documents) == expected
                stats, result = engine.stats(), simulated[policy, share]
            assert stats.num_slots == slots_of(share, shape) == result.slots
            assert stats.hits == result.requests - result.loads, (policy, share)
            assert (stats.misses, stats.late) == (result.loads, 0), (policy, share)
