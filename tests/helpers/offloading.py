"""Tiny models offloaded on the CPU: loading, prompts, logits, tokens, and the books afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import runtime
from routing.inspect_model import topology_of
from tests.helpers.tiny import PAD

Predictor = Callable[[str], Path]
"""What the fixture `tiny_predictor` is."""


def minimum(model: Any) -> float:
    """The fraction of the experts that one layer's top-k is."""
    layers = [layer for stack in topology_of(model).stacks for layer in stack.layers]
    return max(layer.top_k for layer in layers) / sum(layer.num_experts for layer in layers)


def offload(model: Any, size: float | None = 0.25, policy: str = "lru", **options: Any) -> Any:
    """`runtime.load`; a size of None is the smallest there is."""
    return runtime.load(
        model, memory=minimum(model) if size is None else size, policy=policy, **options
    )


def prompts() -> tuple[Tensor, Tensor]:
    """Token ids and mask of three prompts of 12, 7 and 9 tokens, padded at the left."""
    token_ids = torch.randint(2, 256, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(token_ids)
    for row, padding in enumerate((0, 5, 3)):
        token_ids[row, :padding], mask[row, :padding] = PAD, 0
    return token_ids, mask


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    """Of the tokens that are not padding."""
    token_ids, mask = prompts()
    if model.config.is_encoder_decoder:
        decoder_ids = token_ids[:, 5:]
        output = model(token_ids, attention_mask=mask, decoder_input_ids=decoder_ids)
        return output.logits.flatten(0, 1)
    return model(token_ids, attention_mask=mask).logits[mask > 0]


def generate(model: Any, **options: Any) -> Any:
    token_ids, mask = prompts()
    options = {"max_new_tokens": 8, "do_sample": False} | options
    torch.manual_seed(5)
    return model.generate(token_ids, attention_mask=mask, **options)


def check(model: Any) -> None:
    model.expertflow.check_integrity()
    stats = model.expertflow.stats()
    resident = sum(
        pool.cache.num_resident for pool in dict.fromkeys(model.expertflow._backend.pools)
    )
    assert stats.misses == stats.evictions + resident, "whatever was loaded stays or was evicted"
