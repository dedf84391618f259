"""The CPU's share of missed experts: what a captured step leaves to it, and whether it pays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.cache.policies import LFU, LRU
from runtime.cache.policy import Policy
from runtime.cpu.doorbell import Doorbell
from runtime.cpu.library import load_library
from runtime.cpu.service import CpuExperts, doorbell_memory
from runtime.cpu.shape import ExpertShape, SumOrder, halving
from runtime.cuda.decode.experts.blocks import Blocks
from runtime.cuda.decode.experts.experts_call import ExpertsCall
from runtime.cuda.memory.cpu_blocks import cpu_shape, cpu_table
from runtime.cuda.share.order_to_cpu import OrderToCpu
from runtime.cuda.share.share_trial import NEEDED, TURN, ShareTrial, split
from runtime.cuda.share.sum_order import row_sums
from runtime.cuda.trial import SETTLING
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4
from tests.helpers.device_twins import Twin, routes

CPU = torch.device("cpu")
HIDDEN, WIDTH, EXPERTS, TOP_K, SLOTS = 64, 64, 12, 3, 8
OSS = {"activation": "clamped_swiglu", "alternating": True, "has_bias": True}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"packed": True},
    "packed, biased": {"packed": True, **OSS},
    "mxfp4": {"encoding": lambda n, k: MXFP4(), **OSS},
    "int4": {"encoding": lambda n, k: Int4Group(columns=32)},
    "fp8": {"encoding": lambda n, k: FP8Block(rows=32, columns=32)},
    "nvfp4": {"encoding": lambda n, k: NVFP4(rows=n, divides=True)},
}


def twin_of(kind: str, policy: type[Policy] = LRU) -> Twin:
    return Twin(
        policy(2, EXPERTS), num_experts=EXPERTS, top_k=TOP_K, num_slots=SLOTS, hidden=HIDDEN,
        width=WIDTH, dtype=torch.bfloat16, **KINDS[kind],
    )  # fmt: skip


def order_of(columns: int, lanes: int, rows: int) -> SumOrder:
    return SumOrder(columns=columns, steps=halving(lanes), rows=rows)


def shape_of(twin: Twin) -> ExpertShape:
    """The experts of a twin, in sums of an order that nobody prescribes."""
    layout, block = twin.layout, twin.expert_block
    tiles = Blocks.of(1, layout, block)
    each = 1 if block.is_plain else 8
    gate_up = order_of(tiles.columns, tiles.columns // each, tiles.rows)
    down = order_of(tiles.down_columns, tiles.down_columns // each, tiles.down_rows)
    return cpu_shape(layout, block, gate_up, down)


class Shared:
    """A twin whose missed experts are left to threads of this machine."""

    def __init__(self, kind: str, policy: type[Policy] = LRU) -> None:
        self.twin = twin = twin_of(kind, policy)
        bell = Doorbell(TOP_K, HIDDEN)
        memory = doorbell_memory(bell)
        self.order = OrderToCpu(bell, memory, CPU)
        shape = shape_of(twin)
        library = load_library(shape)
        assert not isinstance(library, str), library
        addresses = [blocks_EN.data_ptr() for blocks_EN in twin.layers]
        table = cpu_table(twin.expert_block, addresses, EXPERTS)
        self.service = CpuExperts(library, shape, table, TOP_K, cores=[-1], memory=memory)
        self.call = ExpertsCall(
            1, TOP_K, twin.layout, twin.expert_block, twin.slots_SN, twin,  # type: ignore[arg-type]
            twin.device_cache, order=self.order,
        )  # fmt: skip

    def run(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One layer: prefetching aside, what a step does."""
        return self.call(layer, x, ids, weights)

    def ledger(self) -> Any:
        return self.call.read(self.call.ledger.numpy())


@pytest.fixture
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    made = Shared(*request.param)
    yield made
    made.service.close()


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((1, HIDDEN)).astype(np.float32)).bfloat16()
    weights = torch.rand(1, TOP_K).bfloat16()
    return x, routes(rng, 1, EXPERTS, TOP_K), weights


@pytest.mark.parametrize("shared", [(kind,) for kind in KINDS], ids=KINDS, indirect=True)
def test_a_layer_gives_the_same_whoever_computes_the_missed_experts(shared: Shared) -> None:
    for seed in range(4):
        x, ids, weights = drawn(seed)
        shared.order.set_share([0, 1, 1, 2])
        found = shared.run(seed % 2, x, ids, weights)
        expected = shared.twin.expected(seed % 2, x, ids, weights)
        scale = expected.abs().max()
        torch.testing.assert_close(found.float() / scale, expected / scale, rtol=0, atol=2e-2)
    assert shared.service.counts().refused == 0
    assert shared.service.counts().experts > 0


@pytest.mark.parametrize("shared", [("packed",)], indirect=True)
@pytest.mark.parametrize("share_M", [[0, 0, 0, 0], [0, 1, 1, 2], [0, 1, 2, 3]])
def test_what_is_left_to_the_cpu_takes_no_slot_and_crosses_no_link(
    shared: Shared, share_M: list[int]
) -> None:
    x, ids, weights = drawn(0)
    shared.order.set_share(share_M)
    shared.run(0, x, ids, weights)
    ledger = shared.ledger()
    assert ledger.num_used_L[0] == TOP_K
    assert ledger.num_away_L[0] == share_M[TOP_K]
    assert ledger.num_fetched_L[0] == TOP_K - share_M[TOP_K]
    resident = int((shared.twin.device_cache.slot_of_key >= 0).sum())
    assert resident == TOP_K - share_M[TOP_K]
    shared.twin.device_cache.check_integrity()
    assert shared.service.counts().experts == share_M[TOP_K]


@pytest.mark.parametrize("shared", [("plain", LFU)], indirect=True)
def test_the_experts_that_are_worth_least_are_left_to_the_cpu(shared: Shared) -> None:
    x, _, weights = drawn(0)
    shared.order.set_share([0, 0, 0, 1])
    for _ in range(3):
        shared.order.set_share([0, 0, 0, 0])
        shared.run(0, x, torch.tensor([[4, 7, 9]]), weights)
    shared.twin.device_cache.slot_of_key.fill_(-1)
    shared.twin.device_cache.key_of_slot.fill_(-1)
    shared.order.set_share([0, 0, 0, 1])
    shared.run(0, x, torch.tensor([[7, 2, 4]]), weights)
    resident = shared.twin.device_cache.slot_of_key[:EXPERTS] >= 0
    assert resident.nonzero()[:, 0].tolist() == [4, 7]


def test_rows_that_never_come_are_nan_and_not_somebody_elses() -> None:
    shared = Shared("plain")
    shared.service.close()
    shared.order.set_share([0, 1, 2, 3])
    found = shared.run(0, *drawn(0))
    assert found.isnan().all()


# ---------------------------------------------------------------------- how much


@given(st.integers(1, 10), st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_split_ends_no_later_than_any_other(top_k: int, cpu_s: float, link_s: float) -> None:
    for missed, away in enumerate(split(top_k, cpu_s, link_s)):
        ends = [max(n * cpu_s, (missed - n) * link_s) for n in range(missed + 1)]
        assert ends[away] == min(ends)


def tried(trial: ShareTrial, seconds_of: Any, steps: int = 40 * TURN) -> None:
    share = [0] * 9
    for _ in range(steps):
        share = trial.next_share() or share
        trial.count(seconds_of(share))


def test_the_share_that_makes_steps_fastest_is_kept() -> None:
    trial = ShareTrial(8, 1.0, 1.0)
    tried(trial, lambda share: 5 - share[4] * 0.5 + (share[4] > 2) * 3)
    assert trial.choice is not None and trial.choice[4] == 2
    assert "the CPU computes" in trial.verdict and "ms without" in trial.verdict


def test_a_cpu_that_does_not_pay_is_left_alone() -> None:
    trial = ShareTrial(8, 1.0, 1.0)
    tried(trial, lambda share: 5 + 0.1 * sum(share))
    assert trial.choice == (0,) * 9
    assert "computes no experts" in trial.verdict


def test_a_share_that_is_asked_for_is_kept_even_where_it_costs_time() -> None:
    trial = ShareTrial(8, 1.0, 1.0, always=True)
    tried(trial, lambda share: 5 + 0.1 * sum(share))
    assert trial.choice is not None and any(trial.choice)


def test_steps_count_for_the_share_that_they_ran_with() -> None:
    trial = ShareTrial(8, 1.0, 1.0)
    share, flying = [0] * 9, []
    for step in range(40 * TURN):  # one step runs ahead, and now and then one is dropped
        share = trial.next_share() or share
        flying.append(share)
        if step % 50 == 49:
            trial.forget()
            flying.clear()
        elif len(flying) > 1:
            trial.count(1.0 if any(flying.pop(0)) else 2.0)
    assert trial.choice is not None and any(trial.choice)


def test_what_stops_a_share_is_told() -> None:
    trial = ShareTrial(8, 1.0, 1.0)
    tried(trial, lambda share: 5 - share[4], steps=3 * TURN)
    trial.stop("its threads did not answer in time")
    assert trial.next_share() in ([0] * 9, None)
    assert "did not answer" in trial.verdict
    assert NEEDED > SETTLING


# ---------------------------------------------------------------------- the order of sums

LAYOUTS = {
    "#blocked": "blocked<{sizePerThread = [1, 4], threadsPerWarp = [1, 32], warpsPerCTA = [4, 1], "
    "order = [1, 0]}>",
    "#words": "blocked<{sizePerThread = [1, 1, 4], threadsPerWarp = [16, 2, 1], "
    "warpsPerCTA = [1, 4, 1], order = [2, 0, 1]}>",
    "#linear": "linear<{register = [[0, 1], [1, 0]], lane = [[0, 2], [0, 4], [2, 0], [4, 0], "
    "[0, 0]], warp = [[0, 8], [0, 0]], block = []}>",
}
SUMS = (
    (0, "8xf32, #ttg.slice<{dim = 0, parent = #blocked}>"),
    (1, "8x128xf32, #blocked"),
    (2, "16x16x4xf32, #words"),
    (1, "16x16xf32, #ttg.slice<{dim = 2, parent = #words}>"),
    (1, "8x16xf32, #linear"),
)
REDUCE = """    %sum = "tt.reduce"(%all) <{{axis = {axis} : i32}}> ({{
    ^bb0(%a: f32, %b: f32):
      tt.reduce.return %c : f32
    }}) : (tensor<{of}>) -> tensor<8xf32>
"""
BLOCKED = "\n".join(f"{name} = #ttg.{text}" for name, text in LAYOUTS.items()) + "\n"
BLOCKED += "".join(REDUCE.format(axis=axis, of=of) for axis, of in SUMS)
"""What a compiled kernel looks like, as far as sums go."""


def test_the_order_of_a_sum_is_read_off_its_layout() -> None:
    rows, both, narrow = row_sums(BLOCKED)
    assert rows == ((1, 4), (64, 2), (32, 2), (16, 2), (8, 2), (4, 2))
    assert both == ((1, 4), (32, 2), (4, 2), (16, 2), (8, 2))
    assert narrow == ((1, 2), (4, 2), (2, 2), (8, 2))


def test_a_layout_of_an_unknown_kind_is_refused_by_name() -> None:
    unknown = BLOCKED.replace("#ttg.blocked<", "#ttg.swizzled<")
    with pytest.raises(ValueError, match=r"#ttg.swizzled<.* have no known order"):
        row_sums(unknown)
