"""Prefetch inside a step, by Triton's interpreter: streams are left out, all runs in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from runtime.cache.policies import LRU
from runtime.cuda.decode.experts import experts_call as experts
from runtime.cuda.decode.experts.experts_call import ExpertsCall
from runtime.cuda.decode.experts.ledger import Ledger
from runtime.cuda.kernels import transfer as transfer_kernels
from runtime.cuda.memory.expert_block import CHUNK
from tests.helpers.device_twins import Twin

EXPERTS, TOP_K = 12, 3
FETCH = transfer_kernels.fetch
LARGE: dict[str, Any] = {"hidden": 160, "width": 96}
"""Experts of several chunks."""
FIRST, NEXT = torch.tensor([[0, 1, 2]]), torch.tensor([[4, 5, 6]])


class InOrder:
    """A stream whose work is done as soon as it is enqueued."""

    def __init__(self, *_: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def record_event(self) -> str:
        return "done"


@pytest.fixture(autouse=True)
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "FETCHERS", 2)
    monkeypatch.setattr(experts, "PREFETCHERS", 2)
    monkeypatch.setattr(torch.cuda, "Stream", InOrder)
    monkeypatch.setattr(torch.cuda, "current_stream", InOrder)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)


class Prefetching(Twin):
    """A twin whose experts call prefetches, by a forecast and by routers if there are any."""

    def __init__(
        self,
        likely: dict[int, float] | None = None,
        *,
        routers: list[nn.Module | None] | None = None,
        num_slots: int = 8,
        **options: Any,
    ) -> None:
        torch.manual_seed(1)
        super().__init__(LRU(2, EXPERTS), num_slots=num_slots, **options)
        forecast = None
        if likely is not None:
            forecast = torch.zeros(2 * EXPERTS)
            for expert, probability in likely.items():
                forecast[EXPERTS + expert] = probability
        host: Any = self
        self.call = ExpertsCall(
            options.get("batch", 1), TOP_K, self.layout, self.expert_block, self.slots_SN, host,
            self.device_cache, prefetch=True, routers=routers, forecast=forecast,
            num_ranges=options.get("num_ranges", 1),
        )  # fmt: skip

    def step(self, first: Tensor = FIRST, following: Tensor = NEXT) -> tuple[Tensor, Tensor]:
        """One step: the second layer's output, and what it should be."""
        torch.manual_seed(2)
        x = torch.randn(len(first), self.layout.hidden).to(self.layout.dtype)
        weights = torch.rand(first.shape)
        self.call.begin_step()
        self.call(0, x, first, weights)
        y = self.call(1, x, following, weights)
        self.device_cache.check_integrity()
        return y, self.expected(1, x, following, weights)

    @property
    def ledger(self) -> Ledger:
        return self.call.read(self.call.ledger.numpy())

    def slot_of(self, layer: int, expert: int) -> int:
        return int(self.device_cache.slot_of_key[layer * EXPERTS + expert])

    def holds(self, layer: int, expert: int) -> bool:
        """Whether the expert is in a slot with all its bytes."""
        slot = self.slot_of(layer, expert)
        return slot >= 0 and torch.equal(self.slots_SN[slot], self.expert_blocks[layer, expert])


class Partly:
    """`fetch` of which only the first of two programs gets to run before the layer is planned."""

    def __getitem__(self, _: Any) -> Any:
        return FETCH[(1,)]


@pytest.fixture(params=["whole", "partly"])
def arrival(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "partly":
        monkeypatch.setattr(transfer_kernels, "fetch", Partly())
    return request.param


def test_a_right_prefetch_is_used_and_what_did_not_arrive_is_completed(arrival: str) -> None:
    twin = Prefetching({5: 0.9, 9: 0.7}, **LARGE)
    num_chunks = twin.expert_block.num_chunks
    assert num_chunks > 2
    y, expected = twin.step()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    ledger = twin.ledger
    assert ledger.prefetched_L.tolist() == [-1, 5]
    assert ledger.used_L.tolist() == [0, 1]
    assert ledger.chunks_L[1] == (num_chunks if arrival == "whole" else (num_chunks + 1) // 2)
    assert ledger.num_fetched_L.tolist() == [3, 3]
    assert all(twin.holds(1, expert) for expert in (4, 5, 6))


def test_what_a_prefetch_brought_does_not_cross_the_link_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twin = Prefetching({5: 0.9}, **LARGE)
    block_N = twin.expert_blocks[1, 5].clone()

    class Spoiling(Partly):
        """After the prefetch, the host's copy of what arrived is gone."""

        def __getitem__(self, _: Any) -> Any:
            def run(*args: Any, **options: Any) -> None:
                FETCH[(1,)](*args, **options)
                twin.expert_blocks[1, 5].view(-1, CHUNK)[::2] = 0

            return run

    monkeypatch.setattr(transfer_kernels, "fetch", Spoiling())
    twin.step()
    assert torch.equal(twin.slots_SN[twin.slot_of(1, 5)], block_N)


def test_a_wrong_prefetch_frees_its_slot_and_changes_no_output(arrival: str) -> None:
    twin, plain = Prefetching({9: 0.9}, **LARGE), Prefetching(**LARGE)
    y, expected = twin.step()
    assert torch.equal(y, plain.step()[0])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert (twin.ledger.prefetched_L[1], twin.ledger.used_L[1]) == (9, 0)
    assert twin.slot_of(1, 9) == -1
    assert set(twin.device_cache.key_of_slot.tolist()) == set(
        plain.device_cache.key_of_slot.tolist()
    )


def test_a_copy_ends_at_the_stop_flag() -> None:
    twin = Prefetching(**LARGE)
    expert, slot = (torch.tensor([number], dtype=torch.int32) for number in (5, 2))

    def fetch(stop: int) -> list[int]:
        progress = torch.zeros(2, dtype=torch.int32)
        FETCH[(2,)](
            twin.slots_SN, twin.layers[1], expert, slot,
            torch.tensor([stop], dtype=torch.int32), torch.tensor([7], dtype=torch.int32), progress,
            STORED=twin.expert_block.stored_units, CHUNK=CHUNK, PROGRAMS=2,
        )  # fmt: skip
        return progress.tolist()

    assert fetch(stop=7) == [0, 0]
    assert (twin.slots_SN == 0).all()
    assert sum(fetch(stop=6)) == twin.expert_block.num_chunks
    assert torch.equal(twin.slots_SN[2], twin.expert_blocks[1, 5])


def test_the_plan_raises_the_stop_flag_of_its_own_step() -> None:
    twin = Prefetching({5: 0.9})
    for step in (1, 2):
        twin.step()
        assert twin.call._stop.tolist() == [step, step]


@pytest.mark.parametrize(("num_spare", "chosen"), [(0, -1), (1, 5)])
def test_a_prefetch_never_takes_a_slot_of_the_running_layer(num_spare: int, chosen: int) -> None:
    twin = Prefetching({5: 0.9}, num_slots=TOP_K + num_spare)
    for _ in range(2):
        y, expected = twin.step()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert twin.ledger.prefetched_L[1] == chosen


def test_a_prefetch_takes_the_slot_of_lowest_value() -> None:
    twin = Prefetching({8: 0.9}, num_slots=7)
    twin.step(FIRST, NEXT)
    twin.step(torch.tensor([[3, 7, 8]]), torch.tensor([[8, 9, 10]]))
    assert twin.slot_of(0, 0) == -1  # the oldest made room
    assert twin.ledger.used_L[1] == 1


@pytest.mark.parametrize(("probability", "chosen"), [(0.2, -1), (0.25, 5)])
def test_only_what_is_likely_by_a_trusted_predictor_is_prefetched(
    probability: float, chosen: int
) -> None:
    twin = Prefetching({5: probability})
    twin.step()
    assert twin.ledger.prefetched_L[1] == chosen


def test_what_is_resident_is_not_prefetched() -> None:
    twin = Prefetching({5: 0.9, 9: 0.6}, num_slots=12)
    twin.step()
    assert twin.ledger.prefetched_L[1] == 5
    twin.step()
    assert twin.ledger.prefetched_L[1] == 9


def test_trust_follows_which_first_choices_were_right() -> None:
    right, wrong = Prefetching({5: 0.9}), Prefetching({9: 0.9})
    right.step()
    wrong.step()
    assert right.call._trust[1].item() == pytest.approx(0.98 * 0.9 + 0.02)
    assert wrong.call._trust[1].item() == pytest.approx(0.98 * 0.9)
    assert right.call._trust[0].item() == pytest.approx(0.9)  # no router, no verdict


@pytest.mark.parametrize("bias", [False, True])
def test_the_next_layers_router_looks_ahead(bias: bool) -> None:
    router = nn.Linear(40, EXPERTS, bias=bias)
    twin = Prefetching(routers=[None, router])
    torch.manual_seed(2)
    favourite = int(router(torch.randn(1, 40)).argmax())
    others = [expert for expert in range(EXPERTS) if expert != favourite][:2]
    y, expected = twin.step(following=torch.tensor([[favourite, *others]]))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert twin.ledger.prefetched_L[1] == favourite
    assert twin.ledger.used_L[1] == 1


def test_a_batch_prefetches_for_any_of_its_tokens() -> None:
    twin = Prefetching({6: 0.9}, batch=2, num_slots=14)
    following = torch.tensor([[1, 2, 3], [4, 5, 6]])
    y, expected = twin.step(torch.tensor([[0, 1, 2], [1, 2, 3]]), following)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert (twin.ledger.prefetched_L[1], twin.ledger.used_L[1]) == (6, 1)


IN_RANGES: dict[str, Any] = {"batch": 2, "num_slots": 8, "num_ranges": 4} | LARGE
WIDE = torch.tensor([[0, 1, 2], [4, 7, 11]]), torch.tensor([[1, 2, 6], [6, 8, 9]])


@pytest.mark.parametrize("wanted", [1, 6, 9], ids=["first", "second", "third"])
def test_a_prefetch_serves_whichever_range_needs_it(arrival: str, wanted: int) -> None:
    twin, plain = Prefetching({wanted: 0.9}, **IN_RANGES), Prefetching(**IN_RANGES)
    assert torch.equal(twin.step(*WIDE)[0], plain.step(*WIDE)[0])
    assert (twin.ledger.prefetched_L[1], twin.ledger.used_L[1]) == (wanted, 1)
    assert twin.holds(1, 9)
    assert torch.equal(twin.step(*WIDE)[0], plain.step(*WIDE)[0])


def test_a_prefetch_that_no_range_needs_frees_its_slot(arrival: str) -> None:
    twin, plain = Prefetching({10: 0.9}, **IN_RANGES), Prefetching(**IN_RANGES)
    assert torch.equal(twin.step(*WIDE)[0], plain.step(*WIDE)[0])
    assert (twin.ledger.prefetched_L[1], twin.ledger.used_L[1]) == (10, 0)
    assert twin.slot_of(1, 10) == -1


def test_nothing_is_prefetched_where_a_call_may_need_more_than_the_slots() -> None:
    assert not Prefetching({5: 0.9}, batch=2, num_slots=5, num_ranges=4).call.prefetches
    assert Prefetching({5: 0.9}, batch=2, num_slots=6, num_ranges=4).call.prefetches


def test_a_predictor_with_nothing_to_choose_from_is_not_judged() -> None:
    twin = Prefetching({5: 0.9}, num_slots=24)
    for layer in range(2):
        for start in range(0, EXPERTS, TOP_K):
            twin.call._run_plan(layer, torch.arange(start, start + TOP_K)[None])
    twin.step()
    assert twin.call._trust.tolist() == pytest.approx([0.9, 0.9])
