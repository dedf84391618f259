"""Kernel layouts, the device cache and the counts of the CUDA backend, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")

from routing.layers import MoELayer, find_moe_layers
from runtime.cache.expert_cache import FREE, ExpertCache
from runtime.cache.forecast import Forecast
from runtime.cache.policies import LFU, LRU
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.cache.stats import Stats
from runtime.cuda.decode.device_cache import DeviceCache
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import (
    KernelLayout,
    activate,
    as_model,
    layout_of,
    stored_specs,
)
from runtime.cuda.memory.pinned import parse_cores
from runtime.cuda.prefill.slots import workspace, workspace_bytes
from runtime.weights.arena import Spec, Specs
from runtime.weights.store import ModuleStore
from tests.helpers.tiny import tiny_model

LAYERS, EXPERTS = 3, 6

# ---------------------------------------------------------------------- layouts


def described(model: Any) -> tuple[MoELayer, Specs]:
    layers = find_moe_layers(model)
    return layers[0], ModuleStore(layers).specs(0)


def plain(**changes: Any) -> KernelLayout:
    given: dict[str, Any] = {
        "hidden": 32,
        "width": 24,
        "activation": "silu",
        "dtype": torch.float32,
    }
    given |= {"alternating": False, "transposed": False, "has_bias": False}
    return KernelLayout(**(given | changes))


OSS = {"activation": "clamped_swiglu", "alternating": True, "transposed": True, "has_bias": True}
CASES: dict[str, tuple[str, dict[str, Any], KernelLayout]] = {
    "olmoe": ("olmoe", {}, plain()),
    "mixtral": ("mixtral", {}, plain()),
    "qwen3_moe": ("qwen3_moe", {}, plain()),
    "gpt_oss": ("gpt_oss", {}, plain(**OSS)),
    "gelu": ("mixtral", {"hidden_act": "gelu"}, plain(activation="gelu")),
    "tanh gelu": ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}, plain(activation="gelu_tanh")),
    "relu": ("mixtral", {"hidden_act": "relu"}, plain(activation="relu")),
}


@pytest.mark.parametrize(("width", "together"), [(32, 16), (1024, 6), (16384, 1)])
def test_what_a_budget_reserves_for_unpacked_records_is_what_they_take(
    width: int, together: int
) -> None:
    """As many as fit, one where one is more than that."""
    expert_block = ExpertBlock({"gate_up_proj": Spec((2 * width, 2048), torch.bfloat16),
                     "down_proj": Spec((2048, width), torch.bfloat16)})  # fmt: skip
    buffer = workspace(expert_block, torch.device("meta"))
    assert len(buffer) == together
    assert buffer.nbytes == workspace_bytes(2 * expert_block.units)


@pytest.mark.parametrize("name", CASES)
def test_a_models_experts_are_recognised(name: str) -> None:
    kind, overrides, layout = CASES[name]
    assert layout_of(*described(tiny_model(kind, **overrides))) == layout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_number_format_belongs_to_the_layout(dtype: torch.dtype) -> None:
    assert layout_of(*described(tiny_model("olmoe").to(dtype))) == plain(dtype=dtype)


def refusal(model: Any, **changes: Any) -> str:
    layer, specs = described(model)
    for name, value in changes.items():
        setattr(layer.module, name, value)
    found = layout_of(layer, specs)
    assert isinstance(found, str)
    return found


def test_experts_that_no_kernel_runs_are_refused_with_the_reason() -> None:
    assert "no kernel" in refusal(tiny_model("switch_transformers"))
    assert "float64" in refusal(tiny_model("olmoe").to(torch.float64))
    assert "activation" in refusal(tiny_model("mixtral", hidden_act="tanh"))
    assert "gate_up_proj have no kernel" in refusal(tiny_model("olmoe"), has_gate=False)
    assert "a norm behind" in refusal(tiny_model("olmoe"), has_post_expert_norm=True)


def test_an_experts_class_whose_gate_fails_is_refused() -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("a gate of another shape")

    assert "activation" in refusal(tiny_model("olmoe"), _apply_gate=broken)


def test_transposed_weights_are_stored_the_other_way_round_and_handed_out_as_the_models() -> None:
    layer, specs = described(tiny_model("gpt_oss"))
    layout = layout_of(layer, specs)
    assert isinstance(layout, KernelLayout)
    stored = stored_specs(specs, layout)
    assert stored["gate_up_proj"].shape == (48, 32)
    assert stored["down_proj"].shape == (32, 24)
    assert stored["gate_up_proj_bias"] == specs["gate_up_proj_bias"]
    tensors = {name: torch.zeros(spec.shape) for name, spec in stored.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in as_model(tensors, layout).items()}
    assert shapes == {name: spec.shape for name, spec in specs.items()}
    assert stored_specs(specs, None) is specs


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_the_known_activations_are_the_models_own(kind: str) -> None:
    layer, specs = described(tiny_model(kind))
    layout = layout_of(layer, specs)
    assert isinstance(layout, KernelLayout)
    gate_up = torch.randn(5, 48) * 6
    ours = activate(gate_up, layout)
    own: Any = layer.module
    torch.testing.assert_close(ours, own._apply_gate(gate_up))


# ---------------------------------------------------------------------- device cache


def keys_of(layer: int, *experts: int) -> set[int]:
    return {layer * EXPERTS + expert for expert in experts}


def residents(cache: ExpertCache) -> set[int]:
    return set(cache.key_of_slot.tolist()) - {FREE}


@pytest.mark.parametrize("policy", [LRU, LFU])
def test_books_come_back_from_the_device_as_they_went(policy: Any) -> None:
    cache = ExpertCache(LAYERS, EXPERTS, 7, policy(LAYERS, EXPERTS))
    for layer, experts in [(0, [1, 4]), (1, [0, 3]), (2, [2, 5]), (0, [1, 2])]:
        list(cache.waves(layer, np.array(experts)))
    before = [cache.slot_of_key.copy(), cache.key_of_slot.copy(), cache.policy.values.copy()]
    clock = getattr(cache.policy, "clock", None)
    device_cache = DeviceCache(cache, LAYERS, torch.device("cpu"))
    device_cache.upload()
    device_cache.check_integrity()
    cache.clear()
    cache.policy.values.fill(-1)
    device_cache.download()
    cache.check_integrity()
    after = [cache.slot_of_key, cache.key_of_slot, cache.policy.values]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert getattr(cache.policy, "clock", None) == clock
    assert not device_cache.on_device


def test_books_that_are_on_the_host_are_not_taken_from_the_device() -> None:
    cache = ExpertCache(LAYERS, EXPERTS, 7, LRU(LAYERS, EXPERTS))
    device_cache = DeviceCache(cache, LAYERS, torch.device("cpu"))
    list(cache.waves(0, np.array([1, 4])))
    device_cache.download()
    assert residents(cache) == keys_of(0, 1, 4)


def test_a_policy_that_computes_ahead_goes_to_the_device_as_a_table() -> None:
    policy = PredictedReuse(LAYERS, EXPERTS, horizon=2)
    drawn = np.random.default_rng(0).random((4, LAYERS, EXPERTS), np.float32)
    policy.begin_step(Forecast(*drawn))
    device_cache = DeviceCache(ExpertCache(LAYERS, EXPERTS, 4, policy), LAYERS, torch.device("cpu"))
    device_cache.upload()
    before, after = policy.table()
    assert np.array_equal(device_cache.before.numpy(), before)
    assert np.array_equal(device_cache.after.numpy(), after)
    policy.touch(1, np.array([3]))
    row = slice(EXPERTS, 2 * EXPERTS)
    assert np.array_equal(policy.values[row], device_cache.after.numpy()[row])


def test_books_that_contradict_each_other_are_noticed() -> None:
    cache = ExpertCache(LAYERS, EXPERTS, 4, LRU(LAYERS, EXPERTS))
    list(cache.waves(0, np.array([1, 4])))
    device_cache = DeviceCache(cache, LAYERS, torch.device("cpu"))
    device_cache.upload()
    device_cache.key_of_slot[3] = device_cache.key_of_slot[0]
    with pytest.raises(AssertionError):
        device_cache.check_integrity()


@given(
    st.integers(1, 9),
    st.sets(st.integers(0, EXPERTS - 1)),
    st.sets(st.integers(0, EXPERTS - 1)),
    st.sets(st.integers(0, EXPERTS - 1), max_size=4),
)
def test_experts_admitted_ahead_never_push_out_what_must_stay(
    num_slots: int, first: set[int], likely: set[int], pinned: set[int]
) -> None:
    """Admitted in the given order, as many as there is room for, only those that are missing."""
    cache = ExpertCache(LAYERS, EXPERTS, num_slots, LRU(LAYERS, EXPERTS))
    list(cache.waves(0, np.array(sorted(first), np.int64)))
    list(cache.waves(1, np.array(sorted(likely)[:2], np.int64)))
    before, stay = residents(cache), keys_of(0, *pinned)
    order = np.array(sorted(likely, reverse=True), np.int64)
    lookup = cache.admit(1, order, np.array(sorted(stay), np.int64))
    cache.check_integrity()
    missing = [expert for expert in order.tolist() if EXPERTS + expert not in before]
    held = len((stay | keys_of(1, *likely)) & before)
    assert lookup.experts.tolist() == missing[: max(num_slots - held, 0)]
    assert lookup.missed.all()
    assert residents(cache) >= (stay & before) | keys_of(1, *lookup.experts.tolist())
    assert (cache.key_of_slot[lookup.slots] == EXPERTS + lookup.experts).all()
    assert lookup.num_evicted == len(before - residents(cache))


@given(st.lists(st.integers(-1, LAYERS * EXPERTS - 1), min_size=5, max_size=5))
def test_a_cache_takes_over_books_that_were_kept_elsewhere(owners: list[int]) -> None:
    key_of_slot = np.array([k if owners.index(k) == i else FREE for i, k in enumerate(owners)])
    cache = ExpertCache(LAYERS, EXPERTS, 5, LRU(LAYERS, EXPERTS))
    list(cache.waves(0, np.array([0, 1, 2])))
    cache.adopt(key_of_slot)
    cache.check_integrity()
    assert cache.key_of_slot.tolist() == key_of_slot.tolist()
    list(cache.waves(2, np.arange(5)))
    cache.check_integrity()
    assert residents(cache) == keys_of(2, *range(5))


# ---------------------------------------------------------------------- host and counts


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("0-3\n", {0, 1, 2, 3}),
        ("0-1,8-9", {0, 1, 8, 9}),
        ("5", {5}),
        ("1,3-3", {1, 3}),
        ("\n", set()),
    ],
)
def test_linuxs_list_of_cores_is_read(text: str, cores: set[int]) -> None:
    assert parse_cores(text) == cores


def test_prefetches_of_a_step_are_booked_as_used_late_or_wasted() -> None:
    layers = [MoELayer(str(i), nn.Identity(), "fused", "decoder", 8, 2) for i in range(5)]
    stats = Stats(layers=layers, num_slots=10, policy="lru")
    stats.count_step(np.full(5, 2), np.array([2, 1, 0, 1, 0]), 100, num_tokens=1)
    stats.count_prefetches(
        np.array([0, 0, 1, 0, 0]), begun=3, whole=1, bytes_sent=175, bytes_late=50, bytes_wasted=25
    )
    assert stats.misses_L.tolist() == [2, 1, 0, 1, 0]
    assert stats.late_L.tolist() == [0, 0, 1, 0, 0]
    assert stats.hits_L.tolist() == [0, 1, 1, 1, 2]
    assert (stats.prefetches, stats.prefetches_used) == (3, 2)
    assert stats.bytes_prefetched == 175
    assert stats.bytes_wasted == 25
    assert stats.bytes_loaded == 4 * 100 + 2 * 100 + 25  # misses, prefetched and late, wasted
    assert stats.hit_rate == 5 / 10
