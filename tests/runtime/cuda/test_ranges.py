"""Calls that run in ranges of experts: the bits, the plan and the prefetches of one, out of fewer
slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from runtime.cache.policies import LRU
from runtime.cuda.decode.experts import experts_call as experts
from runtime.cuda.decode.experts.ranges import COUNTS, choose_ranges, most_used, ranges
from runtime.weights.encodings.mxfp4 import MXFP4
from tests.helpers.device_twins import Twin, routes
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.tiny import PAD, tiny_model

LAYERS, EXPERTS, TOP_K, PARTS = 2, 12, 3, 8
OLMOE = {"num_experts": 64, "num_parts": PARTS, "num_keys": 1024, "block_bytes": 9_437_184}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "FETCHERS", 2)


# ---------------------------------------------------------------------- which ranges


@given(st.integers(1, 300), st.sampled_from([1, PARTS]), st.sampled_from(COUNTS))
def test_ranges_take_every_expert_and_every_part_once(
    num_experts: int, num_parts: int, count: int
) -> None:
    chosen = ranges(num_experts, num_parts, count)
    assert 1 <= len(chosen) <= count
    assert [e for one in chosen for e in range(one.first, one.end)] == list(range(num_experts))
    parts = [one.first_part + part for one in chosen for part in range(one.num_parts)]
    assert parts == list(range(num_parts))
    span = -(-num_experts // num_parts)
    assert all(one.first == span * one.first_part for one in chosen)


@pytest.mark.parametrize(
    ("batch", "num_slots", "count"),
    [(8, 339, 4), (32, 339, 4), (32, 171, 4), (2, 339, 1), (32, 900, 1), (32, 1024, 1)],
)
def test_a_call_runs_in_ranges_where_it_takes_a_large_part_of_the_slots(
    batch: int, num_slots: int, count: int
) -> None:
    assert len(choose_ranges(most_routed=8 * batch, num_slots=num_slots, **OLMOE)) == count


def test_small_experts_are_not_worth_the_launches() -> None:
    small = OLMOE | {"block_bytes": 100_000}
    assert len(choose_ranges(most_routed=64, num_slots=339, **small)) == 1
    assert len(choose_ranges(most_routed=8, num_slots=339, **OLMOE | {"num_parts": 1})) == 1


@pytest.mark.parametrize(("num_slots", "needed"), [(63, 32), (31, 16), (8, 8), (7, 8)])
def test_where_a_call_does_not_fit_the_slots_its_ranges_do(num_slots: int, needed: int) -> None:
    """Down to a part of the experts; then there are no ranges that fit."""
    small = OLMOE | {"block_bytes": 100}
    chosen = choose_ranges(most_routed=64, num_slots=num_slots, **small)
    assert most_used(chosen, 64) == needed


# ---------------------------------------------------------------------- what they compute

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "packed": {"dtype": torch.bfloat16, "packed": True},
    "gpt-oss": {"activation": "clamped_swiglu", "alternating": True, "has_bias": True},
    "mxfp4": {
        "dtype": torch.bfloat16, "hidden": 64, "width": 32, "encoding": lambda n, k: MXFP4(),
    },
}  # fmt: skip


def inputs(twin: Twin, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, twin.layout.hidden, generator=generator).to(twin.layout.dtype)
    weights = torch.rand(batch, TOP_K, generator=generator).to(twin.layout.dtype)
    return x, routes(np.random.default_rng(seed), batch, EXPERTS, TOP_K), weights


@pytest.mark.parametrize("kind", KINDS)
def test_any_ranges_out_of_any_slots_compute_the_same_bits(kind: str) -> None:
    """Also out of fewer slots than one call has experts."""
    outputs = []
    for num_ranges, num_slots in [(1, 24), (2, 10), (4, 4), (8, 2)]:
        torch.manual_seed(1)
        twin = Twin(
            LRU(LAYERS, EXPERTS), num_slots=num_slots, batch=4, num_ranges=num_ranges,
            **KINDS[kind],
        )  # fmt: skip
        calls = [(layer, inputs(twin, 4, seed)) for seed, layer in enumerate([0, 1, 0])]
        outputs.append([twin.call(layer, *args) for layer, args in calls])
        twin.device_cache.check_integrity()
    assert all(y.isfinite().all() and y.any() for y in outputs[0])
    assert all(
        torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True)
    )


def test_the_ledger_counts_the_whole_call() -> None:
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=5, batch=2, num_ranges=4)
    x, _, weights = inputs(twin, 2, 0)
    ids = torch.tensor([[11, 0, 4], [8, 4, EXPERTS]])
    twin.call(1, x, ids, weights)
    twin.call(1, x, ids, weights)
    ledger = twin.call.read(twin.call.ledger.numpy())
    assert ledger.routes_LBK[1].tolist() == ids.tolist()
    assert (ledger.num_used_L[1], ledger.num_fetched_L[1]) == (4, 0)


def test_what_a_later_range_needs_stays_while_others_can_go() -> None:
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=6, batch=2, num_ranges=4)
    x, _, weights = inputs(twin, 2, 0)
    twin.call(0, x, torch.tensor([[8, 9, 10], [0, 1, 2]]), weights)
    twin.call(0, x, torch.tensor([[8, 9, 10], [3, 4, 5]]), weights)
    assert twin.fetched()[0] == 3, "8, 9 and 10 were there"


# ---------------------------------------------------------------------- the engine


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize("options", [{}, {"prefetch": True}], ids=["plain", "prefetch"])
def test_many_sequences_are_captured_out_of_fewer_slots_than_they_need(
    options: dict[str, Any],
) -> None:
    model: Any = tiny_model("olmoe")
    ids_BT = torch.randint(2, 256, (4, 6), generator=torch.Generator().manual_seed(3))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    want = model.generate(ids_BT, **settings)
    engine = load_fake(model, memory=5 / 32 + 1e-6, batch=4, **options).expertflow
    assert torch.equal(model.generate(ids_BT, **settings), want)
    assert engine.decode_path == "graph"
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.num_slots, stats.prefetches) == (5, 0)
    assert stats.hits_L.sum() + stats.misses_L.sum() > 4 * 3 * 5, "calls need more than the slots"
