"""Streamed passes and captured steps of many rows: interpreted kernels, copies in host order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from runtime.cache.policies import LRU
from runtime.cache.stats import Stats
from runtime.cuda.backend import CudaBackend
from runtime.cuda.decode import captured_model
from runtime.cuda.decode.decoder import StepResult
from runtime.cuda.kernels import attention
from runtime.cuda.prefill import tiling
from runtime.cuda.wide import wide_rows
from runtime.cuda.wide.regime import Regime
from runtime.cuda.wide.schedule import Schedule
from runtime.cuda.wide.wide_rows import WideRows
from runtime.kv.pages import places
from runtime.serving.request import Request
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers.breaking import POISON, drain, poison
from tests.helpers.device_twins import Twin
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.serving import by_id, greedy, prompts
from tests.helpers.tiny import tiny_model
from tests.helpers.wide_steps import watch_wide_steps
from tests.runtime.cuda.test_prefill import CASES, EXPERTS, Prompts, drawn

LAYERS, TOKENS = 2, 12


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


# ---------------------------------------------------------------------- the schedule


@given(
    st.integers(1, 6), st.integers(1, 20), st.floats(0, 1), st.integers(1, 24), st.integers(1, 3)
)
def test_every_expert_is_in_its_slot_when_its_group_runs(
    layers: int, experts: int, share: float, most: int, passes: int
) -> None:
    if layers * experts < 3:
        return
    num_slots = 2 + int(share * (layers * experts - 3))
    schedule = Schedule(layers, experts, num_slots, most)
    held: dict[int, tuple[int, int]] = {}

    def bring(index: int) -> None:
        group = schedule.groups[index]
        assert 0 <= group.slot <= num_slots - group.size
        for place in range(group.size):
            held[group.slot + place] = (group.layer, group.first + place)

    for index, group in enumerate(schedule.groups):
        if not group.streams:
            bring(index)
    first = schedule.copies[: schedule.ahead]
    for copy in first:
        bring(copy.group)
    for _ in range(passes):
        coming, ran = [*schedule.copies[schedule.ahead :], *first], []
        for index, group in enumerate(schedule.groups):
            ran += [held.get(group.slot + place) for place in range(group.size)]
            while coming and coming[0].after <= index:
                bring(coming.pop(0).group)
        assert ran == [(layer, expert) for layer in range(layers) for expert in range(experts)]
        assert not coming
    assert schedule.num_streamed == layers * experts - sum(schedule.staying)
    assert max(schedule.staying) - min(schedule.staying) <= 1


def test_passes_are_streamed_when_two_of_their_length_have_used_nearly_all_experts() -> None:
    regime = Regime()
    for used, expected in ((0.9, False), (0.95, True), (0.75, True), (0.6, False), (0.9, False)):
        regime.saw(100, used)
        assert regime.expects_all(100) == expected
    regime.saw(100, 0.9)
    assert regime.expects_all(100)
    assert not regime.expects_all(49)
    regime.broke_off()
    assert not regime.expects_all(100)


# ---------------------------------------------------------------------- passes


def passes(twin: Twin, num_slots: int, count: int, tokens: int = TOKENS) -> tuple[Any, Prompts]:
    """The results of some passes over all layers."""
    pool = Prompts(twin, num_slots)
    found = []
    for number in range(count):
        torch.manual_seed(number)
        x_TH, chosen = drawn(twin, tokens, seed=number)
        found.append([pool.experts.run(layer, x_TH, chosen) for layer in range(LAYERS)])
        pool.experts.end_pass()
        pool.pool.cache.check_integrity()
    return found, pool


@pytest.mark.parametrize(
    ("name", "num_slots"), [("few", 2), ("few", 5), ("few", 11), ("gpt-oss", 5), ("packed", 6),
                            ("mxfp4", 6)],
)  # fmt: skip
def test_streaming_changes_no_bit(name: str, num_slots: int) -> None:
    torch.manual_seed(0)
    twin = Twin(LRU(LAYERS, EXPERTS), num_layers=LAYERS, num_experts=EXPERTS, num_slots=2,
                **CASES[name][1])  # fmt: skip
    expected, _ = passes(twin, LAYERS * EXPERTS, 4)
    found, streamed = passes(twin, num_slots, 4)
    for before, after in zip(expected, found, strict=True):
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other)
    wide = streamed.experts._wide
    assert wide is not None
    assert wide._stream.is_whole, "the last passes were streamed"
    per_pass = wide._experts.schedule.num_streamed * streamed.link_bytes(0)
    streamed.stats.reset()
    torch.manual_seed(0)
    x_TH, chosen = drawn(twin, TOKENS)
    for layer in range(LAYERS):
        streamed.experts.run(layer, x_TH, chosen)
    streamed.experts.end_pass()
    assert streamed.stats.bytes_loaded == per_pass


def test_streamed_experts_of_many_rows_are_unpacked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MOST_DECODED_ROWS", 0)
    twin = Twin(LRU(LAYERS, EXPERTS), num_layers=LAYERS, num_experts=EXPERTS, num_slots=2,
                **CASES["packed"][1])  # fmt: skip
    expected, _ = passes(twin, LAYERS * EXPERTS, 4)
    found, _ = passes(twin, 6, 4)
    assert all(
        torch.equal(one, other)
        for before, after in zip(expected, found, strict=True)
        for one, other in zip(before, after, strict=True)
    )


def test_a_layer_out_of_turn_ends_the_streaming_of_its_pass_and_no_more() -> None:
    twin = Twin(LRU(LAYERS, EXPERTS), num_layers=LAYERS, num_experts=EXPERTS, num_slots=2)
    _, pool = passes(twin, 6, 3)
    x_TH, chosen = drawn(twin, TOKENS)
    want = {
        layer: Prompts(twin, LAYERS * EXPERTS).run(layer, x_TH, chosen) for layer in range(LAYERS)
    }
    for order in ((0, 0, 1), (0, 1, 1), (1, 0), (0,), (0, 1)):
        for layer in order:
            assert torch.equal(pool.experts.run(layer, x_TH, chosen), want[layer])
        pool.experts.end_pass()
        pool.pool.cache.check_integrity()


def test_few_tokens_and_other_slots_end_the_streaming() -> None:
    twin = Twin(LRU(LAYERS, EXPERTS), num_layers=LAYERS, num_experts=EXPERTS, num_slots=2)
    _, pool = passes(twin, 6, 3)
    wide: Any = pool.experts._wide
    assert wide.expects_all(TOKENS)
    assert not wide.expects_all(TOKENS // 2 - 1)
    pool.pool.cache.clear()
    assert not wide.expects_all(TOKENS)
    x_TH, chosen = drawn(twin, TOKENS)
    want = Prompts(twin, LAYERS * EXPERTS).run(0, x_TH, chosen)
    assert torch.equal(pool.run(0, x_TH, chosen), want)


# ---------------------------------------------------------------------- captured steps


SERVED: dict[str, Any] = {"batch": 6, "rows": 6, "context": 24, "chunk": 40}


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of more than two rows are wide; the rows of each that ran."""
    monkeypatch.setattr(captured_model, "LARGEST_BATCH", 2)
    monkeypatch.setattr(wide_rows, "WIDE_SIZES", (4, 8))
    return watch_wide_steps(monkeypatch)


def asked_of(count: int, max_tokens: int = 4) -> list[Request]:
    given = prompts(3, count, longest=9)
    return [Request(id=str(i), prompt=p, max_tokens=max_tokens) for i, p in enumerate(given)]


@pytest.mark.parametrize(
    ("kind", "memory", "pages"), [("olmoe", 1.0, None), ("olmoe", 0.6, None), ("gpt_oss", 0.6, 11)]
)
def test_greedy_tokens_of_many_rows_are_those_of_each_request_alone(
    kind: str, memory: float, pages: int | None, few_rows: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With pages of four, of which some come to lie in host memory."""
    monkeypatch.setattr(places, "PAGE", 4)
    monkeypatch.setattr(attention, "LONGEST", 4)
    monkeypatch.setattr(Regime, "expects_all", lambda self, num_tokens: self._in_a_row > 0)
    monkeypatch.setattr("runtime.cuda.wide.regime.MOST_USED", 0.3)
    model: Any = tiny_model(kind, num_hidden_layers=2)
    asked = asked_of(6)
    alone = {r.id: greedy(model, r.prompt, 4) for r in asked}  # type: ignore[arg-type]
    tokens: Any = {} if pages is None else {"cache_tokens": 4 * pages, "spill_tokens": 96}
    engine = load_fake(model, memory=memory, batch=6, context=24, **tokens).expertflow
    served = by_id(engine.serve(asked, **SERVED))
    assert {id: result.token_ids for id, result in served.items()} == alone
    assert few_rows
    assert max(few_rows) > 2
    engine.check_integrity()
    assert (engine.stats().bytes_spilled > 0) == (pages is not None)
    assert engine.stats().tokens >= sum(few_rows)
    assert engine.stats().expert_bytes > 0, "known although the host tier has emptied the store"
    some = greedy(engine.model, asked[0].prompt, 4)  # type: ignore[arg-type]
    assert some == alone["0"], "the slots serve a single sequence again"


def test_a_request_that_fails_in_a_step_of_many_rows_fails_alone(few_rows: list[int]) -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    asked = asked_of(4)
    alone = {r.id: greedy(model, r.prompt, 4) for r in asked}  # type: ignore[arg-type]
    engine = load_fake(model, memory=1.0, batch=6, context=24).expertflow
    loop = ServingLoop(engine, None, ServeSettings(**SERVED))
    poison(loop)
    for request in (*asked, Request(id="broken", prompt=[5, 6], max_tokens=4, label=POISON)):
        loop.submit(request)
    served = drain(loop)
    assert served.pop("broken").finish == "error"
    assert {id: result.token_ids for id, result in served.items()} == alone
    engine.check_integrity()


# ---------------------------------------------------------------------- counts of captured steps


@pytest.mark.parametrize("num_slots", [6, LAYERS * EXPERTS])
def test_a_captured_pass_counts_as_one_that_is_not(num_slots: int) -> None:
    """Streamed, or with a slot for every expert."""
    twin = Twin(LRU(LAYERS, EXPERTS), num_layers=LAYERS, num_experts=EXPERTS, num_slots=2)
    counts, values, expects = [], [], []
    for is_captured in (False, True):
        _, pool = passes(twin, num_slots, 3)
        x_TH, chosen = drawn(twin, TOKENS, seed=7)
        if is_captured:
            routes_BK = chosen.experts_TK.numpy().astype(np.int32)
            pool.experts.count_captured(np.stack([routes_BK] * LAYERS))
        else:
            for layer in range(LAYERS):
                pool.experts.run(layer, x_TH, chosen)
            pool.experts.end_pass()
            pool.stats.steps += 1
            pool.stats.tokens += TOKENS
        counts.append({k: v for k, v in pool.stats.as_dict().items() if k != "seconds"})
        values.append(pool.pool.cache.policy.values.tolist())
        expects.append(pool.experts.captures(TOKENS))
    assert counts[0] == counts[1]
    assert values[0] == values[1]
    assert expects == [True, True]


def counted(engine: Any) -> dict[str, Any]:
    """The counts of now, but for times."""
    counts: dict[str, Any] = engine.stats().as_dict()
    return {name: count for name, count in counts.items() if name not in ("seconds", "policy")}


def counts_by_step(model: Any, asked: list[Request], memory: float) -> list[dict[str, Any]]:
    """After every step of serving, one of which fails."""
    engine = load_fake(model, memory=memory, batch=6, context=24).expertflow
    loop = ServingLoop(engine, None, ServeSettings(**SERVED))
    poison(loop)
    for request in (*asked, Request(id="broken", prompt=[5, 6], max_tokens=4, label=POISON)):
        loop.submit(request)
    found = []
    while not loop.is_idle:
        loop.step()
        found.append(counted(engine))
    engine.detach()
    return found


@pytest.mark.parametrize("memory", [1.0, 0.6])
def test_statistics_at_any_time_are_those_of_counting_at_once(
    memory: float, few_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Regime, "expects_all", lambda self, num_tokens: self._in_a_row > 0)
    monkeypatch.setattr("runtime.cuda.wide.regime.MOST_USED", 0.3)
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    later = counts_by_step(model, asked_of(4), memory)
    assert few_rows
    monkeypatch.setattr(Stats, "count_hits_later", lambda self, count: self._hits.add(count()))
    assert counts_by_step(model, asked_of(4), memory) == later


def test_hits_are_counted_while_the_next_step_runs(
    few_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from a step that was launched, none is due; the last step's are due until read."""
    engine = load_fake(tiny_model("olmoe", num_hidden_layers=2), memory=1.0, batch=6, context=24)
    stats = engine.expertflow.stats()
    due_after: list[tuple[int, int]] = []
    launch = WideRows.launch

    def watched(self: Any, *args: Any) -> Any:
        before = len(stats._hits._due)
        run = launch(self, *args)
        due_after.append((before, len(stats._hits._due)))
        return run

    monkeypatch.setattr(WideRows, "launch", watched)
    by_id(engine.expertflow.serve(asked_of(4), **SERVED))
    assert len(due_after) >= 3
    assert due_after == [(0, 0)] + [(1, 0)] * (len(due_after) - 1)
    assert len(stats._hits._due) == 1
    layers = stats.num_layers
    assert stats.hits >= layers * len(due_after), "each layer uses an expert in every step"
    assert not stats._hits._due


def test_routes_are_made_for_those_who_ask_and_are_those_of_other_passes(
    few_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for = []
    routes_BLK = StepResult.routes_BLK

    def watched(self: StepResult) -> Any:
        asked_for.append(len(self.tokens_B))
        return routes_BLK(self)

    monkeypatch.setattr(StepResult, "routes_BLK", watched)
    model: Any = tiny_model("olmoe", num_hidden_layers=2)

    def seen(engine: Any, watches: bool) -> list[Any]:
        found: list[Any] = []
        loop = ServingLoop(engine, None, ServeSettings(**SERVED))
        loop.watch.watcher = lambda sighting: found.append(sighting.routes_TLK)
        if watches:
            engine.watchers.add(loop)
        for request in asked_of(4):
            loop.submit(request)
        drain(loop)
        engine.detach()
        return found

    options: Any = {"memory": 1.0, "batch": 6, "context": 24}
    assert not seen(load_fake(model, **options).expertflow, watches=False)
    assert few_rows and not asked_for
    captured = seen(load_fake(model, **options).expertflow, watches=True)
    assert asked_for
    monkeypatch.setattr(CudaBackend, "row_decoder", lambda *_: None)
    plain = seen(load_fake(model, **options).expertflow, watches=True)
    assert [routes_TLK.tolist() for routes_TLK in captured] == [
        routes_TLK.tolist() for routes_TLK in plain
    ]
    assert {routes_TLK.dtype for routes_TLK in captured} == {np.dtype(np.int64)}
