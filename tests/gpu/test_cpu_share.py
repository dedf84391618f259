"""The CPU's share of missed experts beside a real GPU: the same bits, whatever the split."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.cuda.share.cpu_share import CpuShare
from tests.gpu.offloaded import MOE_8X32, NEVER, generate_with_logits, needs_gpu, offloaded

pytestmark = needs_gpu

STEPS, ROUNDS = 48, 108
OPTIONS: dict[str, Any] = {"memory": 0.25, "policy": "reuse", "batch": 1, "dtype": "bfloat16"}
LONGEST_S = 120.0


def generated(model: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and logits of a generation in captured steps."""
    found = generate_with_logits(model, seed=seed, max_new_tokens=STEPS, eos_token_id=NEVER)
    assert model.expertflow.decode_path == "graph"
    return found


def settled(model: Any) -> CpuShare:
    """The share of a model, once it is known how large it shall be."""
    share: CpuShare = model.expertflow._backend._share
    start = time.monotonic()
    while time.monotonic() - start < LONGEST_S:
        generated(model, 0)
        if not any(word in share.verdict for word in ("being prepared", "being tried")):
            return share
    raise AssertionError(share.verdict)


def test_logits_are_those_without_the_cpu_bit_for_bit() -> None:
    with offloaded(MOE_8X32, cpu_share=False, **OPTIONS) as model:
        expected = [generated(model, seed) for seed in range(4)]
    with offloaded(MOE_8X32, cpu_share=True, **OPTIONS) as model:
        share = settled(model)
        assert "computes no experts" not in share.verdict, share.verdict
        before = model.expertflow.stats().computed_on_cpu
        found = [generated(model, seed) for seed in range(4)]
        assert model.expertflow.stats().computed_on_cpu > before
        model.expertflow.check_integrity()
    assert all(all(map(torch.equal, *both)) for both in zip(found, expected, strict=True))


@pytest.mark.parametrize("prefetch", [False, True])
def test_random_splits_change_no_bit(prefetch: bool) -> None:
    with offloaded(MOE_8X32, memory=1.0, policy="lru", batch=1, dtype="bfloat16") as model:
        expected = [generated(model, seed) for seed in range(ROUNDS)]
    with offloaded(MOE_8X32, cpu_share=True, prefetch=prefetch, **OPTIONS) as model:
        share = settled(model)
        assert share._trial is not None
        draw = random.Random(0)

        def any_split() -> list[int]:
            return [draw.randint(0, missed) for missed in range(share._top_k + 1)]

        share._trial.next_share = any_split  # type: ignore[method-assign]
        found = [generated(model, seed) for seed in range(ROUNDS)]
        model.expertflow.check_integrity()
    assert all(all(map(torch.equal, *both)) for both in zip(found, expected, strict=True))
