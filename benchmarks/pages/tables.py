"""Every table that a document may have, by the name in its block."""

from __future__ import annotations

from benchmarks.adaptation import page as adaptation
from benchmarks.cache import page as cache
from benchmarks.decode import page as decode
from benchmarks.encodings import page as encodings
from benchmarks.kernels import page as kernels
from benchmarks.lanes import page as lanes
from benchmarks.live_page import page as live_page
from benchmarks.ordering import page as ordering
from benchmarks.pages import others, upcycled
from benchmarks.pages.blocks import Tables
from benchmarks.prefill import page as prefill
from benchmarks.rounding import page as rounding
from benchmarks.throughput import page as throughput

TABLES: Tables = {
    "adaptation-learnt": adaptation.learnt,
    "adaptation-hit-rates": adaptation.hit_rates,
    "adaptation-forgotten": adaptation.forgotten,
    "adaptation-blended": adaptation.blended,
    "adaptation-online": adaptation.online,
    "adaptation-corrections": adaptation.corrections,
    "attention-repeats": others.attention_repeats,
    "attention-times": others.attention_times,
    "contenders": others.contenders,
    "corpus": others.corpus,
    "decode": decode.arms,
    "decode-before-and-after": decode.before_and_after,
    "encodings": encodings.measured,
    "encodings-llama-cpp": encodings.llama_cpp,
    "hit-rates": cache.hit_rates,
    "kernels": kernels.encodings,
    "kernels-attention": kernels.attention,
    "kinds-overview": cache.overview,
    "kinds-groups": cache.by_group,
    "kinds-leads": cache.leads,
    "kinds-live": cache.live_counts,
    "kinds-rules": cache.each_kind,
    "kinds-winners": cache.winners,
    "lanes": lanes.lanes,
    "live-page": live_page.live_page,
    "ordering": ordering.ordering,
    "prompts": prefill.prompts,
    "recall": others.recall,
    "rounding-quality": rounding.quality,
    "rounding-routes": rounding.routes,
    "smol-answers": upcycled.answers,
    "smol-perplexity": upcycled.perplexity,
    "smol-routing": upcycled.routing,
    "throughput": throughput.throughput,
}
"""The functions take the JSON objects of the files, then the options, all texts."""
