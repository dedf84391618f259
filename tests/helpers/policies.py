"""What the tests of cache and policies share: random calls, and every policy ready to use."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from hypothesis import strategies as st

from runtime.cache.belady import Belady, Calls
from runtime.cache.forecast import Forecast
from runtime.cache.policies import POLICIES
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.cache.rules.hot_set import HotSet

LAYERS, NUM_EXPERTS = 3, 6
HORIZON = 4
POLICY_NAMES = list(POLICIES)


def calls_of(
    *, min_experts: int = 1, max_experts: int = NUM_EXPERTS, max_size: int = 40
) -> st.SearchStrategy[Calls]:
    """Expert calls in any order of layers: (layer, distinct experts ascending)."""
    experts = st.sets(
        st.integers(0, NUM_EXPERTS - 1), min_size=min_experts, max_size=max_experts
    ).map(lambda chosen: np.array(sorted(chosen), np.int64))
    return st.lists(st.tuples(st.integers(0, LAYERS - 1), experts), max_size=max_size)


def make_policy(name: str, calls: Iterable[tuple[int, np.ndarray]]) -> Policy:
    """The policy `name`; `calls` are what it will see, for the one that must know."""
    if name == Belady.name:
        return Belady(LAYERS, NUM_EXPERTS, calls=calls)
    if name == HotSet.name:
        return HotSet(LAYERS, NUM_EXPERTS, calls=calls)
    if name == PredictedReuse.name:
        return PredictedReuse(LAYERS, NUM_EXPERTS, horizon=HORIZON)
    return POLICIES[name](LAYERS, NUM_EXPERTS)


def random_forecast(seed: int) -> Forecast:
    """Random probabilities, zeros and ones among them."""
    random = np.random.default_rng(seed)
    drawn = random.uniform(-0.2, 1.2, (4, LAYERS, NUM_EXPERTS)).clip(0, 1).astype(np.float32)
    return Forecast(*drawn)
