"""Every table that a document may have, by the name in its block."""

from __future__ import annotations

from benchmarks.cache import page as cache
from benchmarks.pages.blocks import Tables

TABLES: Tables = {
    "kinds-overview": cache.overview,
    "kinds-groups": cache.by_group,
    "kinds-leads": cache.leads,
    "kinds-rules": cache.each_kind,
    "kinds-winners": cache.winners,
}
