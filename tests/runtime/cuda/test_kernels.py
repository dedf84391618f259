"""The plan and the experts of the GPU engine, by Triton's interpreter on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from runtime.cache.belady import Belady
from runtime.cache.expert_cache import ExpertCache
from runtime.cache.forecast import Forecast
from runtime.cache.policies import LFU, LRU
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.cache.rules.class_lru import ClassLRU
from runtime.cache.rules.lfru import LFRU
from runtime.cache.rules.reuse import Reuse
from runtime.cuda.decode.experts import experts_call as experts
from tests.helpers.device_twins import Twin, routes

LAYERS, EXPERTS, TOP_K = 2, 12, 3


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "FETCHERS", 2)


class Planned(NamedTuple):
    """What the planning kernel said."""

    experts: list[int]
    slots: list[int]
    fetched: list[int]
    """Experts in the order in which they are to be fetched."""
    rest: list[int]


def plan(twin: Twin, layer: int, ids: Any, index: int = 0) -> Planned:
    twin.call._run_plan(layer, torch.as_tensor(ids), index)
    num_used, num_fetched, _ = twin.call._counts[layer, index].tolist()
    asked, slots, order = (row[:num_used].tolist() for row in twin.call._plan[:3])
    turns = [asked[index] for index in order]
    return Planned(asked, slots, turns[:num_fetched], turns[num_fetched:])


def residents(twin: Twin) -> set[int]:
    keys = twin.device_cache.key_of_slot.tolist()
    return {key for key in keys if key >= 0}


def random_calls(seed: int, batch: int, num_steps: int) -> list[list[Tensor]]:
    """Routes of every layer of every step, skewed so that some experts come back often."""
    rng = np.random.default_rng(seed)
    liked = [rng.permutation(EXPERTS)[:5] for _ in range(LAYERS)]

    def draw(layer: int) -> Tensor:
        if rng.random() < 0.3:
            return routes(rng, batch, EXPERTS, TOP_K)
        return torch.from_numpy(liked[layer])[routes(rng, batch, 5, TOP_K)]

    return [[draw(layer) for layer in range(LAYERS)] for _ in range(num_steps)]


def distinct(ids: Tensor) -> np.ndarray:
    return np.unique(ids.numpy())


# ---------------------------------------------------------------------- the plan


def make_policy(name: str, calls: list[list[Tensor]]) -> Policy:
    if name == "belady":
        flat = [(layer, distinct(ids)) for step in calls for layer, ids in enumerate(step)]
        return Belady(LAYERS, EXPERTS, calls=flat)
    if name == "predicted":
        return PredictedReuse(LAYERS, EXPERTS, horizon=4)
    rules: dict[str, type[Policy]] = {rule.name: rule for rule in (LRU, LFU, ClassLRU, LFRU, Reuse)}
    policy = rules[name](LAYERS, EXPERTS)
    if name == "lfu":  # so that no two values are ever equal
        policy.values[:] = np.random.default_rng(7).random(LAYERS * EXPERTS) * 1e-3
    if isinstance(policy, Reuse):
        policy._means[:] += np.random.default_rng(7).random(LAYERS * EXPERTS) * 1e-3
    if isinstance(policy, LFRU):
        policy._uses[:] = np.random.default_rng(7).random(LAYERS * EXPERTS)
    return policy


def forecast(rng: np.random.Generator, policy: Policy) -> Forecast | None:
    if not policy.needs_forecast:
        return None
    return Forecast(*rng.random((4, LAYERS, EXPERTS), np.float32))


@pytest.mark.parametrize(
    ("batch", "num_ranges", "num_slots"), [(1, 1, 10), (3, 1, 10), (3, 4, 10), (3, 4, 5)]
)
@pytest.mark.parametrize(
    "name", ["lru", "lfu", "class-lru", "lfru", "reuse", "predicted", "belady"]
)
def test_the_plan_misses_and_evicts_what_the_cache_on_the_host_does(
    name: str, batch: int, num_ranges: int, num_slots: int
) -> None:
    calls = random_calls(3, batch, num_steps=12)
    policy = make_policy(name, calls)
    options: dict[str, Any] = {
        "batch": batch,
        "num_ranges": num_ranges,
        "num_slots": num_slots,
    }
    twin = Twin(make_policy(name, calls), **options)
    host = ExpertCache(LAYERS, EXPERTS, num_slots, policy)
    rng = np.random.default_rng(5)
    for step in calls:
        policy.begin_step(forecast(rng, policy))
        twin.call.begin_step()
        table = policy.table()
        if table is not None:
            twin.device_cache.write_table(*table)
        for layer, ids in enumerate(step):
            span = twin.call._ranges[0].end
            lookups = host.ranges(layer, distinct(ids), span)
            for index in range(len(twin.call._ranges)):
                planned = plan(twin, layer, ids, index)
                if not planned.experts:
                    continue
                lookup = next(lookups)
                assert planned.experts == lookup.experts.tolist()
                if name != "belady":  # two that are next used by one call are worth the same
                    assert planned.fetched == lookup.experts[lookup.missed].tolist()
                    assert residents(twin) == set(host.key_of_slot.tolist()) - {-1}
                elif num_ranges == 1:
                    assert len(planned.fetched) == lookup.missed.sum()
                twin.device_cache.check_integrity()
            assert next(lookups, None) is None


@pytest.mark.parametrize("name", ["lru", "lfu", "reuse"])
def test_books_that_come_back_from_the_device_go_on_as_if_they_had_never_left(name: str) -> None:
    calls = random_calls(4, 1, num_steps=6)
    twin = Twin(make_policy(name, calls), num_slots=6)
    host = ExpertCache(LAYERS, EXPERTS, 6, make_policy(name, calls))
    for number, step in enumerate(calls):
        host.policy.begin_step(None)
        if number < 3:
            twin.call.begin_step()
        else:
            twin.device_cache.download()
            twin.cache.check_integrity()
            twin.cache.policy.begin_step(None)
        for layer, ids in enumerate(step):
            (lookup,) = host.waves(layer, distinct(ids))
            if number < 3:
                plan(twin, layer, ids)
            else:
                (again,) = twin.cache.waves(layer, distinct(ids))
                assert again.missed.tolist() == lookup.missed.tolist()
    assert np.array_equal(twin.cache.policy.values, host.policy.values)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, LAYERS - 1),
            st.lists(st.integers(-2, EXPERTS + 3), min_size=6, max_size=6),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_ids_get_a_slot_each_and_nobodys_ids_none(calls: list[tuple[int, list[int]]]) -> None:
    """Duplicates are one expert, ids outside 0 .. E-1 are none; a call may need every slot."""
    twin = Twin(LRU(LAYERS, EXPERTS), batch=2, num_slots=6)
    for layer, ids in calls:
        before = residents(twin)
        planned = plan(twin, layer, [ids[:3], ids[3:]])
        asked = sorted({expert for expert in ids if 0 <= expert < EXPERTS})
        keys = [layer * EXPERTS + expert for expert in asked]
        assert planned.experts == asked
        assert len(set(planned.slots)) == len(asked)
        assert [int(twin.device_cache.key_of_slot[slot]) for slot in planned.slots] == keys
        assert planned.fetched == [
            e for e, key in zip(asked, keys, strict=True) if key not in before
        ]
        assert sorted(planned.fetched + planned.rest) == asked
        assert len(residents(twin)) == min(6, len(before | set(keys)))  # free slots first
        twin.device_cache.check_integrity()


def test_the_plan_leaves_the_routes_for_the_host() -> None:
    twin = Twin(LRU(LAYERS, EXPERTS), batch=2, num_slots=6)
    ids = torch.tensor([[4, 4, 12], [-1, 0, 7]])
    plan(twin, 1, ids)
    ledger = twin.call.read(twin.call.ledger.numpy())
    assert ledger.routes_LBK[1].tolist() == ids.tolist()
    assert (ledger.num_used_L[1], ledger.num_fetched_L[1]) == (3, 3)


# ---------------------------------------------------------------------- the experts

OSS = {"activation": "clamped_swiglu", "alternating": True, "has_bias": True}
SHAPES: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu in fp16": {"activation": "gelu", "dtype": torch.float16},
    "tanh gelu": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    "without a gate": {"activation": "relu2"},
    "a batch without a gate": {"activation": "relu2", "batch": 3, "has_bias": True},
    "packed without a gate": {"activation": "relu2", "dtype": torch.bfloat16, "packed": True},
    "gpt-oss": OSS,
    "bf16": {"dtype": torch.bfloat16},
    "bf16 packed": {"dtype": torch.bfloat16, "packed": True},
    "gpt-oss in packed bf16": OSS | {"dtype": torch.bfloat16, "packed": True},
    "packed, several tiles": {"hidden": 528, "width": 40, "dtype": torch.bfloat16, "packed": True},
    "a batch in bf16": {"batch": 3, "dtype": torch.bfloat16},
    "a packed batch": {"batch": 3, "dtype": torch.bfloat16, "packed": True},
    "a packed gpt-oss batch": OSS | {"batch": 3, "dtype": torch.bfloat16, "packed": True},
    "several tiles": {"hidden": 530, "width": 12},
    "a batch": {"batch": 3},
    "a batch in fp16": {"batch": 2, "dtype": torch.float16, "activation": "gelu"},
    "a gpt-oss batch": OSS | {"batch": 3},
    "a batch of several tiles": {"batch": 2, "hidden": 150, "width": 36},
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def inputs(twin: Twin, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, twin.layout.hidden, generator=generator).to(twin.layout.dtype)
    weights = torch.rand(batch, TOP_K, generator=generator).to(twin.layout.dtype)
    return x, routes(np.random.default_rng(seed), batch, EXPERTS, TOP_K), weights


@pytest.mark.parametrize("name", SHAPES)
def test_experts_compute_what_float32_does(name: str) -> None:
    options = SHAPES[name]
    batch = options.get("batch", 1)
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=9, **options)
    for seed, layer in enumerate([0, 1, 1]):
        x, ids, weights = inputs(twin, batch, seed)
        y = twin.call(layer, x, ids, weights)
        expected = twin.expected(layer, x, ids, weights)
        assert y.dtype == x.dtype
        error = (y.float() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[twin.layout.dtype]


@pytest.mark.parametrize("batch", [1, 2])
def test_duplicates_add_up_and_ids_of_nobody_add_nothing(batch: int) -> None:
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=6, batch=batch)
    x, _, weights = inputs(twin, batch, 0)
    ids = torch.tensor([[5, 5, EXPERTS], [-1, EXPERTS + 3, -7]])[:batch]
    y = twin.call(0, x, ids, weights)
    torch.testing.assert_close(y, twin.expected(0, x, ids, weights), rtol=1e-5, atol=1e-5)
    assert (y[1:] == 0).all()


def test_arguments_in_any_order_of_memory_compute_the_same() -> None:
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=9, batch=2)
    given = inputs(twin, 2, 0)
    expected = twin.call(0, *given)
    turned = [tensor.t().contiguous().t() for tensor in given]
    assert not any(tensor.is_contiguous() for tensor in turned)
    assert torch.equal(twin.call(0, *turned), expected)


def test_an_expert_that_is_not_finite_spoils_only_the_tokens_that_go_there() -> None:
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=6, batch=2)
    twin.expert_block.views(twin.expert_blocks)["down_proj"][0, 4] = float("nan")
    x, _, weights = inputs(twin, 2, 0)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    y = twin.call(0, x, ids, weights)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[0], twin.expected(0, x, ids, weights)[0], rtol=1e-5, atol=1e-5)


def test_what_a_token_gets_does_not_depend_on_who_shares_its_batch() -> None:
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=9, batch=3, dtype=torch.bfloat16)
    first, second = inputs(twin, 3, 0), inputs(twin, 3, 1)
    alike = [torch.cat([one[:1], other[1:]]) for one, other in zip(first, second, strict=True)]
    assert torch.equal(twin.call(0, *first)[0], twin.call(0, *alike)[0])


PACKED: dict[str, Any] = {"dtype": torch.bfloat16, "packed": True}


@pytest.mark.parametrize(
    "options",
    [{}, {"batch": 2}, OSS, PACKED, PACKED | {"batch": 2}],
    ids=["one", "batch", "gpt-oss", "packed", "packed batch"],
)
def test_outputs_are_bit_identical_whatever_is_resident(options: dict[str, Any]) -> None:
    batch = options.get("batch", 1)
    outputs = []
    for policy, num_slots in [(LRU, 24), (LRU, 3 * batch), (LFU, 7)]:
        torch.manual_seed(1)
        twin = Twin(policy(LAYERS, EXPERTS), num_slots=num_slots, **options)
        calls = [(layer, inputs(twin, batch, seed)) for seed, layer in enumerate([0, 1, 0, 1])]
        outputs.append([twin.call(layer, *args) for layer, args in calls])
    assert all(
        torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True)
    )


def test_what_was_resident_is_not_fetched_again() -> None:
    """Its bytes on the host may have changed: nobody looks."""
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=6)
    x, ids, weights = inputs(twin, 1, 0)
    first = twin.call(0, x, ids, weights)
    assert twin.fetched()[0] == 3
    twin.expert_blocks[0].zero_()
    assert torch.equal(twin.call(0, x, ids, weights), first)
    assert twin.fetched()[0] == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_patched_weights_count_like_all_others(batch: int) -> None:
    """As many as there is room for, anywhere in a chunk and at its ends, far from the others."""
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=9, batch=batch, **PACKED)
    views = twin.expert_block.views(twin.expert_blocks)
    for name, places in (("gate_up_proj", [0, 1, 39, 40, 1919]), ("down_proj", [0, 23, 500, 959])):
        flat = views[name].flatten(2)
        flat[:, :, places] = torch.randn(LAYERS, EXPERTS, len(places)).bfloat16() * 1e3
        flat[:, :, 7] = 1e-30
        flat[:, :, 60:90], flat[:, :, 90:120] = 0.0, -0.0
    twin.layers[:] = [twin._layer(expert_blocks) for expert_blocks in twin.expert_blocks]
    x, ids, weights = inputs(twin, batch, 0)
    y, expected = twin.call(0, x, ids, weights), twin.expected(0, x, ids, weights)
    assert (y.float() - expected).abs().max() / expected.abs().max() < 2e-2
