"""Drawn routes: they reach the stated hit rate, and follow real traces at other sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.replay.drawn_routes import (
    LocalText,
    draw_routes,
    drawn_hit_rate,
    fit_steepness,
    lru_hit_rate,
)
from routing.shards import TraceReader, signed_experts
from routing.topology import Layer, Stack
from trace.collect import collect
from trace.settings import CollectSettings

ROOT = Path(__file__).parents[2]


def stack(layers: int, experts: int, top_k: int) -> Stack:
    layer = [Layer(f"layers.{i}", experts, top_k) for i in range(layers)]
    return Stack(name="decoder", layers=tuple(layer))


TOPOLOGIES = {
    "olmoe": stack(16, 64, 8),
    "gpt-oss-20b": stack(24, 32, 4),
    "mixtral": stack(32, 8, 2),
    "narrow": stack(4, 32, 4),
}


@pytest.mark.parametrize(
    ("name", "hit_rate"),
    [("olmoe", 0.45), ("gpt-oss-20b", 0.7), ("mixtral", 0.3), ("narrow", 0.3), ("narrow", 0.7)],
)
def test_drawn_routes_reach_the_asked_hit_rate_in_documents_that_were_not_fitted(
    name: str, hit_rate: float
) -> None:
    steepness = fit_steepness(TOPOLOGIES[name], hit_rate)
    reached = drawn_hit_rate(TOPOLOGIES[name], steepness, seed=1000)
    assert reached == pytest.approx(hit_rate, abs=0.02)


def test_a_hit_rate_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a hit rate of 0\.01 cannot be drawn"):
        fit_steepness(TOPOLOGIES["narrow"], 0.01)


def test_the_text_says_the_hit_rate_that_it_reached_and_repeats_itself() -> None:
    text = LocalText(100, TOPOLOGIES["narrow"], 0.5)
    assert text.routes.startswith(("drawn, LRU hits 0.5", "drawn, LRU hits 0.4"))
    one, two = (text.passages(2, 40, first=3) for _ in range(2))
    assert one.experts_BTLK is not None and two.experts_BTLK is not None
    assert one.experts_BTLK.shape == (2, 40, 4, 4)
    assert np.array_equal(one.experts_BTLK, two.experts_BTLK)
    assert not np.array_equal(one.experts_BTLK[0], one.experts_BTLK[1])


def test_a_token_uses_different_experts_of_a_layer() -> None:
    routes_TLK = draw_routes(TOPOLOGIES["olmoe"], 5.0, 50, seed=0)
    ordered = np.sort(routes_TLK, axis=-1)
    assert (np.diff(ordered, axis=-1) > 0).all()
    assert ordered.min() >= 0 and ordered.max() < 64


def test_hit_rates_are_of_one_cache_that_the_first_document_fills() -> None:
    first, second = np.array([[[0]], [[1]]]), np.array([[[1]], [[2]], [[1]], [[0]]])
    assert lru_hit_rate([first, second], num_experts=4, share=0.5) == 0.5
    assert lru_hit_rate([first, second], num_experts=4, share=1.0) == 0.75


def test_drawn_routes_follow_a_real_trace_at_other_cache_sizes(tmp_path: Path) -> None:
    settings = CollectSettings(
        model=str(ROOT / "exports" / "moe-8x32"),
        dataset=[str(ROOT / "exports" / "sample")],
        out=str(tmp_path / "trace"),
        max_tokens=160,
        max_documents=40,
    )
    collect(settings)
    reader = TraceReader(tmp_path / "trace")
    experts = reader.stack.num_experts
    documents = [
        signed_experts(reader.document(index).experts_TLK, experts).astype(np.int64)
        for index in np.flatnonzero(reader.doc_lengths == 160).tolist()
    ]
    steepness = fit_steepness(reader.stack, lru_hit_rate(documents, experts, 0.25))
    for share in (0.125, 0.5, 0.75):
        real = lru_hit_rate(documents, experts, share)
        assert drawn_hit_rate(reader.stack, steepness, share=share) == pytest.approx(real, abs=0.06)
