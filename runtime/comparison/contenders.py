"""The contenders of a comparison: everything that `runtime.simulation` can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from runtime.cache.belady import Belady, Calls
from runtime.cache.forecast import Forecast
from runtime.cache.policies import QUEUE_CACHES
from runtime.comparison.settings import CompareSettings
from runtime.comparison.split import Split
from runtime.simulation.baselines import TokenTable
from runtime.simulation.comparison import Contender, decode_steps
from runtime.simulation.contenders import all_contenders, decoded
from runtime.simulation.lookahead_contenders import Sample
from runtime.simulation.replay import BypassSimulation, QueueSimulation

OPTIMUM = Belady.name
"""The optimum of caches that keep whatever a layer has just used."""


Call = tuple[int, np.ndarray]


class Simulated(Protocol):
    """A cache that counts what it is asked for, and what it has to load."""

    name: str
    requests: int
    loads: int

    def step(self, forecast: Forecast | None, calls: Calls) -> None:
        """Serve the expert calls of one forward pass."""


class Field(NamedTuple):
    """What is compared, on which tokens."""

    contenders: list[Contender]
    sample: Sample
    calls: list[list[Call]]
    """Expert calls of each step."""
    shape: tuple[int, int]
    """(L, E)"""


def field_of(split: Split, settings: CompareSettings) -> Field:
    """The contenders, fitted, and the steps to run them on.

    Raises ValueError for a predictor of another model, or one that needs token ids where the trace
    has none.
    """
    reader = split.compared
    for path in settings.predictors:
        reader.require_token_ids(f"the predictor {path}")
    shape = reader.stack.num_layers, reader.stack.num_experts
    sample = decoded(list(reader.documents()), shape[1])
    simulation = settings.simulation(split.fit.directory)
    contenders = [
        contender
        for contender in all_contenders(simulation, reader, sample, shape)
        if reader.extras.token_ids or contender.name != TokenTable.name
    ]
    calls = [list(step.calls()) for step in decode_steps(sample.steps)]
    return Field(contenders, sample, calls, shape)


def simulations(
    shape: tuple[int, int], num_slots: int, calls: Sequence[Calls]
) -> Mapping[str, Simulated]:
    """Caches that are no policy over slots, by name: they have a hit rate, and no forecast."""
    flat = [call for step in calls for call in step]
    built: list[Simulated] = [
        *(QueueSimulation(cache(*shape, num_slots)) for cache in QUEUE_CACHES.values()),
        BypassSimulation(Belady(*shape, calls=flat), *shape, num_slots),
    ]
    return {one.name: one for one in built}
