"""The gap to Belady: the share of it that a policy closes, against LRU and the best free rule.

The best free rule is the one that did best on these tokens at this size, chosen in hindsight: a
bar that no single rule reaches everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from runtime.cache.policies import FREE_RULES


def best_free_rule(hit_rates: Mapping[str, float]) -> str | None:
    """The free rule of the highest hit rate; None where none ran. hit_rates: by policy."""
    ran = [name for name in FREE_RULES if name in hit_rates]
    return max(ran, key=lambda name: hit_rates[name], default=None)


def gap_closed(hit_rate: float, floor: float, optimum: float) -> float:
    """The share of the way from `floor` to `optimum`, all hit rates; NaN if there is no way."""
    return (hit_rate - floor) / (optimum - floor) if optimum > floor else math.nan
