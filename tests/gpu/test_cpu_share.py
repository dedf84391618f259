"""The CPU's share of missed experts beside a real GPU: the same bits, whatever the split."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from runtime.cuda.share.cpu_share import CpuShare
from tests.gpu.offloaded import MOE_8X32, needs_gpu, offloaded, prompts

pytestmark = needs_gpu

LENGTH, STEPS = 12, 48
OPTIONS: dict[str, Any] = {"memory": 0.25, "policy": "reuse", "batch": 1, "dtype": "bfloat16"}
LONGEST_S = 120.0


def generated(model: Any, seed: int) -> Any:
    """A generation with its logits."""
    inputs = {name: tensor.cuda() for name, tensor in prompts(1, LENGTH, seed).items()}
    return model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=1 << 20,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


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
        expected = [torch.stack(generated(model, seed).logits) for seed in range(4)]
    with offloaded(MOE_8X32, cpu_share=True, **OPTIONS) as model:
        share = settled(model)
        assert "computes no experts" not in share.verdict, share.verdict
        before = model.expertflow.stats().computed_on_cpu
        found = [torch.stack(generated(model, seed).logits) for seed in range(4)]
        assert model.expertflow.stats().computed_on_cpu > before
        model.expertflow.check_integrity()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("prefetch", [False, True])
def test_random_splits_change_no_token(prefetch: bool) -> None:
    with offloaded(MOE_8X32, memory=1.0, policy="lru", batch=1, dtype="bfloat16") as model:
        expected = [generated(model, seed).sequences for seed in range(40)]
    with offloaded(MOE_8X32, cpu_share=True, prefetch=prefetch, **OPTIONS) as model:
        share = settled(model)
        assert share._trial is not None
        draw = random.Random(0)

        def any_split() -> list[int]:
            return [draw.randint(0, missed) for missed in range(share._top_k + 1)]

        share._trial.next_share = any_split  # type: ignore[method-assign]
        found = [generated(model, seed).sequences for seed in range(40)]
        model.expertflow.check_integrity()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
