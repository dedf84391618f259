"""Budgets for everything on the device: what the slots get, and what has to stay in host memory."""

from __future__ import annotations

from typing import Any

from runtime.cuda.memory.host_dense import movable_bytes
from runtime.cuda.prefill.streaming_pool import workspace_bytes
from runtime.kv import static_cache as kv
from runtime.weights.arena import expert_bytes
from runtime.weights.source import Source

CUBLAS_BYTES = 64 << 20
"""cuBLAS keeps 32 MiB for each stream it works on: ours and the captured one."""


def fit(source: Source, budget: int, *, context: int, batch: int) -> tuple[int, int]:
    """Split a budget of bytes for everything on the device.

    Returns the bytes for `slots_per_group` (the model's other weights and the slots), and how many
    bytes of other weights have to stay in host memory so that the least slots fit.
    """
    left = budget - _reserved(source, context, batch)
    least = sum(
        expert_bytes(group.specs) * max(source.layers[index].top_k for index in group.layers)
        for group in source.groups
    )
    short = max(source.fixed_bytes + least - left, 0)
    missing = short if short <= movable_bytes(source.model) else 0
    return left, missing


def _reserved(source: Source, context: int, batch: int) -> int:
    """Bytes beside weights and slots: key/value cache, the activations of a prompt that fills it,
    and the buffers of kernels and copies.
    """
    config: Any = source.model.config
    text = config.get_text_config(decoder=True)
    dtype = next(source.model.parameters()).dtype
    sizes = [expert_bytes(group.specs) for group in source.groups]
    top_k = max(layer.top_k for layer in source.layers)
    width = max(max(spec.shape) for group in source.groups for spec in group.specs.values())
    activations = context * batch * (top_k * (text.hidden_size + width) + 8 * text.hidden_size)
    logits = 4 * batch * text.vocab_size * 4
    cache = kv.num_bytes(text, batch, context, dtype)
    return (
        CUBLAS_BYTES + workspace_bytes(max(sizes)) + activations * dtype.itemsize + logits + cache
    )
