"""What is sent ahead inside a step, by Triton's interpreter: streams are left out, all runs in
order, and a copy ends where a test says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("triton")

from triton.runtime.errors import InterpreterError

from runtime.cache.policies import LRU
from runtime.cache.policy import Policy
from runtime.cache.rules.reuse import Reuse
from runtime.cuda.decode.experts import experts_call as experts
from runtime.cuda.decode.experts import mover
from runtime.cuda.decode.experts.experts_call import ExpertsCall
from runtime.cuda.decode.experts.ledger import Ledger
from runtime.cuda.kernels import gate_up
from runtime.cuda.kernels import transfer as transfer_kernels
from runtime.cuda.memory.expert_block import CHUNK
from tests.helpers.device_twins import Twin, routes

EXPERTS, TOP_K = 12, 3
FETCH, BRING = transfer_kernels.fetch, transfer_kernels.bring
LARGE: dict[str, Any] = {"hidden": 96, "width": 64}
"""Experts of several chunks."""
FIRST, NEXT = torch.tensor([[0, 1, 2]]), torch.tensor([[4, 5, 6]])
WHOLE = 1 << 20
"""More chunks than there are."""


class InOrder:
    """A stream whose work is done as soon as it is enqueued."""

    def __init__(self, *_: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def record_event(self) -> str:
        return "done"


@pytest.fixture(autouse=True)
def _in_order() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        in_order(patch)
        yield


def in_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(experts, "FETCHERS", 2)
    patch.setattr(mover, "PREFETCHERS", 2)
    patch.setattr(torch.cuda, "Stream", InOrder)
    patch.setattr(torch.cuda, "current_stream", InOrder)
    patch.setattr(torch.cuda, "stream", nullcontext)


class Stopped:
    """`fetch` that the next plan ends after so many chunks, given by the window of a step: 0 comes
    before the first layer.
    """

    def __init__(self, patch: pytest.MonkeyPatch, chunks: dict[int, int], other: int = 0) -> None:
        self._chunks, self._other = chunks, other
        self.window = -1
        self.brought: list[int] = []
        """In each window, until it ended."""
        patch.setattr(transfer_kernels, "fetch", self)

    def __getitem__(self, grid: Any) -> Any:
        return self._run

    def _run(self, *args: Any, **options: Any) -> None:
        most, cursor = self._chunks.get(self.window, self._other), args[3]
        done = 0

        def bring(*given: Any) -> None:
            nonlocal done
            if done == most:
                raise StopIteration
            BRING(*given)
            done += 1

        with pytest.MonkeyPatch.context() as patch, suppress(InterpreterError):
            patch.setattr(transfer_kernels, "bring", bring)
            FETCH[(1,)](*args, **options)
        cursor.fill_(done)
        self.brought.append(done)


class Prefetching(Twin):
    """A twin whose experts call sends experts ahead, by a forecast and by routers if there are any.

    likely: probabilities by key (layer * E + expert) in this step, and `following` in the next.
    """

    def __init__(
        self,
        likely: dict[int, float] | None = None,
        following: dict[int, float] | None = None,
        *,
        routers: list[nn.Module | None] | None = None,
        policy: type[Policy] = LRU,
        num_slots: int = 8,
        num_layers: int = 2,
        prefetch: bool = True,
        **options: Any,
    ) -> None:
        torch.manual_seed(1)
        super().__init__(
            policy(num_layers, EXPERTS), num_slots=num_slots, num_layers=num_layers, **options
        )
        self.chances = None
        if likely is not None:
            self.chances = torch.zeros(2, num_layers * EXPERTS)
            for row, known in zip(self.chances, (likely, following or {}), strict=True):
                for key, probability in known.items():
                    row[key] = probability
        host: Any = self
        self.call = ExpertsCall(
            options.get("batch", 1), TOP_K, self.layout, self.expert_block, self.slots_SN, host,
            self.device_cache, prefetch=prefetch, routers=routers, chances=self.chances,
            num_ranges=options.get("num_ranges", 1),
        )  # fmt: skip
        self.stopped: Stopped | None = None

    def compute(self, *calls: Tensor) -> list[Tensor]:
        """One step of experts calls: their outputs, which are checked against the weights'."""
        torch.manual_seed(2)
        self._begin()
        outputs = []
        for layer, ids in enumerate(calls):
            x = torch.randn(len(ids), self.layout.hidden)
            weights = torch.rand(ids.shape)
            outputs.append(self._call(layer, x, ids, weights))
            expected = self.expected(layer, x, ids, weights)
            torch.testing.assert_close(outputs[-1], expected, rtol=1e-5, atol=1e-5)
        self._end()
        return outputs

    def step(self, *calls: Tensor) -> None:
        """One step of experts calls that move experts and leave out the products."""
        torch.manual_seed(2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gate_up, "run_tile", lambda *_: None)
            patch.setattr(ExpertsCall, "_sum_range", lambda *_: None)
            patch.setattr(ExpertsCall, "_joined", lambda *given: given[-1])
            self._begin()
            for layer, ids in enumerate(calls):
                x = torch.randn(len(ids), self.layout.hidden)
                self._call(layer, x, ids, torch.rand(ids.shape))
            self._end()

    def _begin(self) -> None:
        self.device_cache.has_parts = self.call.prefetches
        self._at(0)
        self.call.begin_step()

    def _call(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self._at(layer + 1)
        y = self.call(layer, x, ids, weights)
        self.check()
        if self.call._counts.shape[1] == 1:  # a range gives its slots to the next
            assert all(self.holds(layer, expert) for expert in ids.flatten().tolist())
        return y

    def _end(self) -> None:
        self.call.end_step()
        self.check()

    def _at(self, window: int) -> None:
        if self.stopped is not None:
            self.stopped.window = window

    def check(self) -> None:
        """The tables agree, and what is resident by them is there, all but what is in part."""
        cache = self.device_cache
        cache.check_integrity()
        parts = set(cache.rest.nonzero()[:, 0].tolist())
        for slot, key in enumerate(cache.key_of_slot.tolist()):
            if key >= 0 and slot not in parts:
                assert self.holds(*divmod(key, EXPERTS))

    @property
    def ledger(self) -> Ledger:
        return self.call.read(self.call.ledger.numpy())

    @property
    def listed(self) -> list[int]:
        """Keys that have been sent ahead and are not used yet."""
        cache = self.device_cache
        sent = cache.sent.nonzero()[:, 0]
        return sorted(cache.key_of_slot[sent].tolist())

    def slot_of(self, layer: int, expert: int) -> int:
        return int(self.device_cache.slot_of_key[layer * EXPERTS + expert])

    def holds(self, layer: int, expert: int) -> bool:
        """Whether the expert is in a slot with all its bytes."""
        slot = self.slot_of(layer, expert)
        return slot >= 0 and torch.equal(self.slots_SN[slot], self.layers[layer][expert])

    @property
    def chunks(self) -> int:
        """Chunks of an expert."""
        return self.expert_block.num_chunks


def at(layer: int, expert: int) -> int:
    return layer * EXPERTS + expert


ARRIVALS = {"whole": WHOLE, "partly": 2, "not at all": 0}


@pytest.fixture(params=ARRIVALS)
def arrival(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks that come in every window."""
    return ARRIVALS[request.param]


def stopping(twin: Prefetching, patch: pytest.MonkeyPatch, chunks: int) -> Prefetching:
    twin.stopped = Stopped(patch, {}, chunks)
    return twin


# ---------------------------------------------------------------------- what came is used


def test_a_right_guess_is_used_and_what_did_not_arrive_is_completed(
    arrival: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = stopping(Prefetching({at(1, 5): 0.9}, **LARGE), monkeypatch, arrival)
    assert twin.chunks > 4
    twin.stopped = Stopped(monkeypatch, {1: arrival})
    twin.step(FIRST, NEXT)
    ledger, come = twin.ledger, min(arrival, twin.chunks)
    assert ledger.moved.brought == come
    assert ledger.moved.begun == (come > 0)
    assert ledger.moved.whole_L.tolist() == [0, come == twin.chunks]
    assert ledger.moved.late_L.tolist() == [0, 0 < come < twin.chunks]
    assert ledger.moved.lacked == (twin.chunks - come if 0 < come < twin.chunks else 0)
    assert ledger.num_fetched_L.tolist() == [3, 2 if come == twin.chunks else 3]
    assert all(twin.holds(1, expert) for expert in (4, 5, 6))


def test_what_was_sent_ahead_does_not_cross_the_link_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twin = Prefetching({at(1, 5): 0.9}, **LARGE)
    twin.stopped = Stopped(monkeypatch, {1: 3})
    block_N = twin.layers[1][5].clone()
    brought = twin.call.__call__

    def spoil(layer: int, *args: Any) -> Tensor:
        if layer == 1:  # after the prefetch, the host's copy of what came is gone
            twin.layers[1][5].view(-1, CHUNK)[:3] = 0
        return brought(layer, *args)

    monkeypatch.setattr(ExpertsCall, "__call__", lambda _, *args: spoil(*args))
    monkeypatch.setattr(Prefetching, "check", lambda _: None)
    monkeypatch.setattr(Prefetching, "holds", lambda *_: True)
    twin.step(FIRST, NEXT)
    assert torch.equal(twin.slots_SN[twin.slot_of(1, 5)], block_N)


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_neither_right_nor_wrong_guesses_change_an_output(
    chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Prefetching(prefetch=False).compute(FIRST, NEXT)
    twin = Prefetching({at(1, 5): 0.9})
    twin.stopped = Stopped(monkeypatch, {1: chunks})
    assert all(map(torch.equal, twin.compute(FIRST, NEXT), plain))
    twin = Prefetching({at(1, 9): 0.9})
    twin.stopped = Stopped(monkeypatch, {1: chunks})
    assert all(map(torch.equal, twin.compute(FIRST, NEXT), plain))
    assert not twin.ledger.moved.late_L.any()
    assert not twin.ledger.moved.whole_L.any()


def test_what_was_not_needed_waits_in_part_and_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twin = Prefetching({at(1, 9): 0.9}, {at(1, 9): 0.5}, num_slots=12, **LARGE)
    twin.stopped = Stopped(monkeypatch, {1: 2, 2: 1})
    twin.step(FIRST, NEXT)
    assert twin.listed == [at(1, 9)]
    assert twin.device_cache.rest[twin.slot_of(1, 9)] == twin.chunks - 3
    twin.stopped = Stopped(monkeypatch, {0: 1})
    twin.step(FIRST, torch.tensor([[7, 8, 9]]))
    ledger = twin.ledger
    assert (ledger.moved.brought, ledger.moved.begun) == (1, 0)
    assert ledger.moved.late_L.tolist() == [0, 1]
    assert ledger.moved.lacked == twin.chunks - 4
    assert twin.listed == []


def test_what_never_began_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = stopping(Prefetching({at(1, 5): 0.9, at(1, 9): 0.8}), monkeypatch, 0)
    plain = Prefetching(prefetch=False)
    for calls in ((FIRST, NEXT), (NEXT, FIRST), (NEXT + 3, FIRST)):
        twin.step(*calls)
        plain.step(*calls)
        ours, theirs = twin.device_cache.key_of_slot, plain.device_cache.key_of_slot
        assert torch.equal(ours, theirs)
    assert twin.listed == []


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_every_used_expert_is_there_wherever_copies_stop(data: st.DataObject) -> None:
    """Two steps over three layers with a chunk boundary drawn for every window; after each layer
    the tables agree, and the bytes of all that is resident are the experts' own.
    """
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    likely = {int(key): float(rng.random()) for key in rng.permutation(3 * EXPERTS)[:16]}
    following = {int(key): float(rng.random()) for key in rng.permutation(3 * EXPERTS)[:16]}
    options: dict[str, Any] = {"num_layers": 3, "num_slots": data.draw(st.integers(3, 12)), **LARGE}
    options["policy"] = data.draw(st.sampled_from([LRU, Reuse]))
    with pytest.MonkeyPatch.context() as patch:
        in_order(patch)
        twin = Prefetching(likely, following, **options)
        sent = used = wasted = 0
        for _ in range(2):
            ends = data.draw(st.lists(st.integers(0, 3 * twin.chunks), min_size=4, max_size=4))
            twin.stopped = Stopped(patch, dict(enumerate(ends)))
            twin.step(*(routes(rng, 1, EXPERTS, TOP_K) for _ in range(3)))
            moved = twin.ledger.moved
            assert moved.brought == sum(twin.stopped.brought)
            sent += moved.brought
            used += (moved.whole + int(moved.late_L.sum())) * twin.chunks - moved.lacked
            wasted += moved.wasted
        assert sent == used + wasted + int(twin.device_cache.sent.sum())


# ---------------------------------------------------------------------- what is chosen


def test_the_order_is_that_of_probability_and_urgency(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"num_layers": 3, "num_slots": 20, **LARGE}
    likely = {at(1, 5): 0.7, at(2, 7): 0.9, at(1, 4): 0.85, at(2, 9): 0.5}
    for num_moves, key in enumerate((at(1, 4), at(2, 7), at(1, 5), at(2, 9)), start=1):
        twin = Prefetching(likely, {}, **options)
        twin.stopped = Stopped(monkeypatch, {1: num_moves * twin.chunks})
        twin.call.begin_step()
        twin.stopped.window = 1
        twin.call(0, torch.randn(1, 96), FIRST, torch.rand(1, TOP_K))
        moves = twin.call._mover._moves[0].tolist()  # type: ignore[union-attr]
        assert moves[num_moves - 1] == key


def test_a_layer_without_a_likely_miss_leaves_the_link_to_later_ones() -> None:
    twin = Prefetching({at(2, 7): 0.9}, num_layers=3)
    twin.step(FIRST, NEXT, torch.tensor([[7, 8, 9]]))
    assert twin.ledger.moved.whole_L.tolist() == [0, 0, 1]


def test_the_next_token_is_prepared_after_the_last_layer() -> None:
    twin = Prefetching({}, {at(0, 8): 0.9}, num_slots=12)
    twin.step(FIRST, NEXT)
    assert twin.listed == [at(0, 8)]
    twin.step(torch.tensor([[7, 8, 9]]), NEXT)
    assert twin.ledger.moved.whole_L.tolist() == [1, 0]


def test_a_step_is_prepared_before_its_first_layer() -> None:
    twin = Prefetching({at(0, 1): 0.9}, {}, num_slots=12)
    twin.step(FIRST, NEXT)
    assert twin.ledger.moved.whole_L.tolist() == [1, 0]
    assert twin.ledger.num_fetched_L.tolist() == [2, 3]


def test_without_a_predictor_the_uses_seen_say_what_the_next_token_needs() -> None:
    twin = Prefetching(policy=Reuse, num_slots=6)
    for _ in range(6):
        twin.step(FIRST, NEXT)
    twin.step(torch.tensor([[9, 10, 11]]), NEXT)  # pushes what is used always out
    assert set(twin.listed) <= {at(0, expert) for expert in (0, 1, 2)}
    twin.step(FIRST, NEXT)
    assert twin.ledger.moved.whole > 0


def test_one_guess_for_the_next_layer_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "DEPTH", 1)
    monkeypatch.setattr(mover, "REACH", 1)
    likely = {at(0, 2): 0.9, at(1, 5): 0.7, at(1, 4): 0.8, at(2, 9): 0.9}
    twin = Prefetching(likely, {at(0, 0): 0.9}, num_layers=3, num_slots=14)
    twin.step(FIRST, NEXT, torch.tensor([[7, 8, 9]]))
    assert twin.ledger.moved.whole_L.tolist() == [0, 1, 1]
    assert twin.ledger.moved.begun == 2


@pytest.mark.parametrize(("num_spare", "sent"), [(0, 0), (1, 1)])
def test_a_move_never_takes_a_slot_of_the_running_layer(num_spare: int, sent: int) -> None:
    twin = Prefetching({at(1, 5): 0.9}, num_slots=TOP_K + num_spare)
    for _ in range(2):
        twin.step(FIRST, NEXT)
        assert twin.ledger.moved.whole_L.tolist()[1] == sent


def test_a_move_takes_the_slot_of_lowest_value() -> None:
    twin = Prefetching({at(1, 8): 0.9}, num_slots=7)
    twin.step(FIRST, NEXT)
    twin.step(torch.tensor([[3, 7, 8]]), torch.tensor([[8, 9, 10]]))
    assert twin.slot_of(0, 0) == -1  # the oldest made room
    assert twin.ledger.moved.whole_L.tolist()[1] == 1


@pytest.mark.parametrize(("probability", "sent"), [(0.2, False), (0.95, True)])
def test_no_slot_is_taken_from_an_expert_that_is_worth_more(probability: float, sent: bool) -> None:
    twin = Prefetching(policy=Reuse, num_slots=6)
    for _ in range(8):
        twin.step(FIRST, NEXT)  # all six are used in every step
    guess = torch.zeros(2, 2 * EXPERTS)
    guess[0, at(1, 9)] = probability
    host: Any = twin
    twin.call = ExpertsCall(
        1, TOP_K, twin.layout, twin.expert_block, twin.slots_SN, host, twin.device_cache,
        prefetch=True, chances=guess,
    )  # fmt: skip
    twin.step(FIRST, NEXT)
    assert (twin.ledger.moved.begun > 0) == sent


@pytest.mark.parametrize(("probability", "sent"), [(0.1, 0), (0.12, 1)])
def test_only_what_is_likely_by_a_trusted_predictor_is_sent(probability: float, sent: int) -> None:
    twin = Prefetching({at(1, 5): probability})
    twin.step(FIRST, NEXT)
    assert twin.ledger.moved.begun == sent


def test_what_is_resident_is_not_sent() -> None:
    twin = Prefetching({at(1, 5): 0.9}, num_slots=12)
    twin.step(FIRST, NEXT)
    assert twin.ledger.moved.begun == 1
    twin.step(FIRST, NEXT)
    assert twin.ledger.moved.begun == 0


def test_trust_follows_which_first_choices_were_right(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = Prefetching({at(1, 5): 0.9}), Prefetching({at(1, 9): 0.9})
    Stopped(monkeypatch, {})  # what came before the first layer would be no choice any more
    for twin, trust in ((right, 0.98 * 0.9 + 0.02), (wrong, 0.98 * 0.9)):
        twin.step(FIRST, NEXT)
        found = twin.call._mover._trust.tolist()  # type: ignore[union-attr]
        assert found == pytest.approx([0.9, trust])  # no router, no verdict


@pytest.mark.parametrize("bias", [False, True])
def test_the_next_layers_router_looks_ahead(bias: bool) -> None:
    router = nn.Linear(40, EXPERTS, bias=bias)
    twin = Prefetching(routers=[None, router])
    torch.manual_seed(2)
    favourite = int(router(torch.randn(1, 40)).argmax())
    others = [expert for expert in range(EXPERTS) if expert != favourite][:2]
    twin.step(FIRST, torch.tensor([[favourite, *others]]))
    assert twin.ledger.moved.whole_L.tolist()[1] > 0


def test_a_batch_sends_ahead_for_any_of_its_tokens() -> None:
    twin = Prefetching({at(1, 6): 0.9}, batch=2, num_slots=14)
    twin.step(torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert twin.ledger.moved.whole_L.tolist() == [0, 1]


# ---------------------------------------------------------------------- ranges, and other steps

IN_RANGES: dict[str, Any] = {"batch": 2, "num_slots": 8, "num_ranges": 4} | LARGE
WIDE = torch.tensor([[0, 1, 2], [4, 7, 11]]), torch.tensor([[1, 2, 6], [6, 8, 9]])


@pytest.mark.parametrize("wanted", [1, 6, 9, 10], ids=["first", "second", "third", "none"])
def test_what_was_sent_serves_whichever_range_needs_it(
    arrival: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = Prefetching({at(1, wanted): 0.9}, **IN_RANGES)
    twin.stopped = Stopped(monkeypatch, {1: arrival})
    twin.step(*WIDE)
    moved = twin.ledger.moved
    assert moved.whole + int(moved.late_L.sum()) == (arrival > 0 and wanted != 10)
    twin.step(*WIDE)


def test_ranges_that_use_what_was_sent_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"batch": 2, "num_slots": 8, "num_ranges": 4}
    plain = Prefetching(prefetch=False, **options).compute(*WIDE)
    twin = Prefetching({at(1, 1): 0.9, at(1, 6): 0.8, at(1, 9): 0.7}, **options)
    twin.stopped = Stopped(monkeypatch, {1: 3})
    assert all(map(torch.equal, twin.compute(*WIDE), plain))
    assert twin.ledger.moved.late_L.tolist() == [0, 1]


def test_nothing_is_sent_where_a_call_may_need_more_than_the_slots() -> None:
    assert not Prefetching({5: 0.9}, batch=2, num_slots=5, num_ranges=4).call.prefetches
    assert Prefetching({5: 0.9}, batch=2, num_slots=6, num_ranges=4).call.prefetches


def test_nothing_is_sent_where_layers_have_experts_of_different_numbers() -> None:
    twin = Prefetching({5: 0.9})
    twin.layers[1] = twin.layers[1][:-1]
    host: Any = twin
    call = ExpertsCall(
        1, TOP_K, twin.layout, twin.expert_block, twin.slots_SN, host, twin.device_cache,
        prefetch=True,
    )  # fmt: skip
    assert not call.prefetches


def test_parts_are_dropped_before_anything_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Prefetching({at(1, 9): 0.9}, num_slots=12, **LARGE)
    twin.stopped = Stopped(monkeypatch, {1: 2})
    twin.step(FIRST, NEXT)
    cache = twin.device_cache
    assert cache.rest.any()
    assert not cache.resident()[at(1, 9)]
    assert cache.resident().sum() == 6
    cache.on_device = True
    cache.download()
    assert not cache.rest.any()
    assert twin.slot_of(1, 9) == -1
    assert twin.cache.num_resident == 6
    twin.check()


def test_a_step_that_was_broken_off_loses_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Prefetching({at(1, 9): 0.9}, num_slots=8, **LARGE)
    twin.step(FIRST, NEXT)
    num_owned = (twin.device_cache.key_of_slot >= 0).sum()
    monkeypatch.setattr(transfer_kernels, "fetch", Stopped(monkeypatch, {}))
    twin.call.begin_step()
    twin.call(0, torch.randn(1, 96), FIRST, torch.rand(1, TOP_K))
    twin.step(FIRST, NEXT)
    assert (twin.device_cache.key_of_slot >= 0).sum() == num_owned


def test_a_predictor_with_nothing_to_choose_from_is_not_judged() -> None:
    twin = Prefetching({at(1, 5): 0.9}, num_slots=24)
    for layer in range(2):
        for start in range(0, EXPERTS, TOP_K):
            twin.call._run_plan(layer, torch.arange(start, start + TOP_K)[None])
    twin.call._run_gate_up(0, torch.randn(1, 40), 2)
    trust = twin.call._mover._trust  # type: ignore[union-attr]
    trust.fill_(0.9)
    twin.call.begin_step()
    for layer, ids in enumerate((FIRST, NEXT)):
        twin.call(layer, torch.randn(1, 40), ids, torch.rand(1, TOP_K))
    assert trust.tolist() == pytest.approx([0.9, 0.9])


def test_a_copy_ends_when_the_cursor_says_so() -> None:
    twin = Prefetching({}, **LARGE)
    mover_of = twin.call._mover
    assert mover_of is not None
    for cursor, there in ((transfer_kernels.ENDED.value, False), (0, True)):
        mover_of._moves.fill_(-1)
        mover_of._moves[:3, 0] = torch.tensor([at(1, 5), 2, 0], dtype=torch.int32)
        mover_of._cursor.fill_(cursor)
        FETCH[(2,)](
            twin.slots_SN, mover_of._addresses, mover_of._moves, mover_of._cursor, E=EXPERTS,
            STORED=twin.expert_block.stored_units, CHUNK=CHUNK, DEPTH=mover.DEPTH,
        )  # fmt: skip
        assert torch.equal(twin.slots_SN[2], twin.layers[1][5]) == there
