"""Captured steps whose experts all have a slot, by Triton's interpreter on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from runtime.cache.policies import LFU, LRU
from runtime.cuda.decode.experts import experts_call as experts
from runtime.cuda.decode.experts.experts_call import ExpertsCall
from runtime.weights.encodings.mxfp4 import MXFP4
from tests.helpers.device_twins import Twin, routes

LAYERS, EXPERTS, TOP_K = 2, 12, 3
OSS = {"activation": "clamped_swiglu", "alternating": True, "has_bias": True}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "gpt-oss": OSS,
    "packed": {"dtype": torch.bfloat16, "packed": True},
    "mxfp4": {
        "dtype": torch.bfloat16, "hidden": 64, "width": 32,
        "encoding": lambda rows, columns: MXFP4(rows=1, columns=32),
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "FETCHERS", 2)


def filled(twin: Twin) -> ExpertsCall:
    """The call of a twin whose experts are all in slots, in an order of its own."""
    blocks_SN = torch.cat(twin.layers)
    keys = torch.randperm(len(blocks_SN)).int()
    twin.slots_SN[:] = blocks_SN[keys]
    tables = twin.device_cache
    tables.key_of_slot.copy_(keys)
    tables.slot_of_key[keys] = torch.arange(len(keys), dtype=torch.int32)
    host: Any = twin
    return ExpertsCall(
        twin.call._batch, TOP_K, twin.layout, twin.expert_block, twin.slots_SN, host, tables,
        resident=True,
    )  # fmt: skip


def inputs(twin: Twin, batch: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, twin.layout.hidden, generator=generator).to(twin.layout.dtype)
    weights = torch.rand(batch, TOP_K, generator=generator).to(twin.layout.dtype)
    return x, routes(np.random.default_rng(seed), batch, EXPERTS, TOP_K), weights


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_steps_that_fetch(kind: str, batch: int) -> None:
    torch.manual_seed(1)
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=24, batch=batch, **KINDS[kind])
    calls = [(layer, inputs(twin, batch, seed)) for seed, layer in enumerate([0, 1, 0, 1])]
    expected = [twin.call(layer, *args) for layer, args in calls]
    twin.slots_SN.zero_()
    call = filled(twin)
    for (layer, args), y in zip(calls, expected, strict=True):
        assert torch.equal(call(layer, *args), y)
        assert torch.count_nonzero(y)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", [LRU, LFU])
def test_policies_and_the_ledger_see_the_same_uses(policy: type[LRU | LFU], batch: int) -> None:
    ids = torch.tensor([[5, 1, 9], [1, 1, EXPERTS], [-1, 0, 3]])[:batch]
    ledgers, values, clocks = [], [], []
    for resident in (False, True):
        twin = Twin(policy(LAYERS, EXPERTS), num_slots=24, batch=batch)
        call = filled(twin) if resident else twin.call
        x, _, weights = inputs(twin, batch, 0)
        for layer in (0, 1):
            call.begin_step()
            call(layer, x, ids, weights)
        ledgers.append(call.read(call.ledger.numpy()))
        values.append(twin.device_cache.values.tolist())
        clocks.append(twin.device_cache.clock.item())
    assert ledgers[0].routes_LBK.tolist() == ledgers[1].routes_LBK.tolist()
    assert ledgers[0].num_used_L.tolist() == ledgers[1].num_used_L.tolist()
    assert ledgers[1].num_fetched_L.tolist() == [0, 0]
    assert values[0] == values[1] and clocks[0] == clocks[1]


@pytest.mark.parametrize("ids", [[5, 5, EXPERTS], [-1, EXPERTS + 3, -7], [2, -1, 2]])
def test_duplicates_add_up_and_ids_of_nobody_add_nothing(ids: list[int]) -> None:
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=24)
    call = filled(twin)
    x, _, weights = inputs(twin, 1, 0)
    asked = torch.tensor([ids])
    y = call(1, x, asked, weights)
    torch.testing.assert_close(y, twin.expected(1, x, asked, weights), rtol=1e-5, atol=1e-5)


def test_nothing_is_prefetched() -> None:
    twin = Twin(LRU(LAYERS, EXPERTS), num_slots=24)
    host: Any = twin
    call = ExpertsCall(
        1, TOP_K, twin.layout, twin.expert_block, twin.slots_SN, host, twin.device_cache,
        resident=True, prefetch=True,
    )  # fmt: skip
    assert not call.prefetches
