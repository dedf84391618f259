"""All cache policies by name, and the free rules among them."""

from __future__ import annotations

from runtime.cache.belady import Belady
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.cache.rules.arc import ARC
from runtime.cache.rules.class_lru import ClassLRU
from runtime.cache.rules.frequency import LFU
from runtime.cache.rules.hot_set import HotSet
from runtime.cache.rules.layer_lfru import LayerLFRU
from runtime.cache.rules.lfru import LFRU
from runtime.cache.rules.queue_cache import QueueCache
from runtime.cache.rules.recency import LRU, LeastStale
from runtime.cache.rules.reuse import Reuse
from runtime.cache.rules.s3_fifo import S3FIFO

__all__ = [
    "FREE_RULES", "LFU", "LIVE_FREE_RULES", "LRU", "POLICIES", "QUEUE_CACHES", "LeastStale",
]  # fmt: skip

_FREE: tuple[type[Policy], ...] = (LRU, LFU, ClassLRU, LFRU, Reuse)
_LIVE: tuple[type[Policy], ...] = (*_FREE, HotSet, PredictedReuse, Belady)
POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in _LIVE}
"""The policies that run live."""
QUEUE_CACHES: dict[str, type[QueueCache]] = {
    cache.name: cache for cache in (ARC, S3FIFO, LayerLFRU)
}
"""The rules that are simulated only."""
LIVE_FREE_RULES = tuple(policy.name for policy in _FREE)
"""The names of the live rules that need neither a predictor, nor a trace, nor the future."""
FREE_RULES = (*LIVE_FREE_RULES, *QUEUE_CACHES)
"""The same, with those that are simulated only."""
