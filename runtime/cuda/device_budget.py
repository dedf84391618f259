"""A memory budget on a GPU: what the slots get, and what has to stay in host memory."""

from __future__ import annotations

from typing import Any

from runtime.cuda.memory.host_dense import movable_bytes
from runtime.cuda.prefill.streaming_pool import workspace_bytes
from runtime.kv.size import storage_bytes
from runtime.sizing.budget import SlotBudget, slot_budget
from runtime.weights.arena import expert_bytes
from runtime.weights.source import Source

CUBLAS_BYTES = 64 << 20
"""cuBLAS keeps 32 MiB for each stream that it works on: the current and the captured one."""


def device_budget(source: Source, memory: float | int, *, context: int, batch: int) -> SlotBudget:
    """The slots that `memory` pays for on a GPU.

    A fraction counts experts. Bytes are for everything on the device: key/value cache, workspaces
    and graphs too; weights other than experts move to host memory where the least slots would not
    fit beside them. Raises ValueError as `slot_budget` does.
    """
    if isinstance(memory, float):
        return slot_budget(memory, source)
    reserved = reserved_bytes(source, context=context, batch=batch)
    least = sum(
        expert_bytes(group.specs) * max(source.layers[index].top_k for index in group.layers)
        for group in source.groups
    )
    short = max(source.fixed_bytes + least - (memory - reserved), 0)
    host_bytes = short if short <= movable_bytes(source.model) else 0
    return slot_budget(memory, source, reserved=reserved, host_bytes=host_bytes)


def reserved_bytes(source: Source, *, context: int, batch: int) -> int:
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
    cache = storage_bytes(text, batch, context, dtype)
    return (
        CUBLAS_BYTES + workspace_bytes(max(sizes)) + activations * dtype.itemsize + logits + cache
    )
