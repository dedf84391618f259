"""A memory budget on a GPU: what the slots get, and what has to stay in host memory."""

from __future__ import annotations

import math
from typing import Any

from runtime.cuda.memory.host_dense import movable_bytes
from runtime.cuda.memory.kernel_layout import KernelLayout, block_of, common_layout
from runtime.cuda.options import LARGEST_BATCH
from runtime.cuda.prefill.slots import workspace_bytes
from runtime.kv.size import storage_bytes
from runtime.kv.state_kinds import require_pages
from runtime.sizing.budget import SlotBudget, slot_budget
from runtime.weights.arena import expert_bytes
from runtime.weights.source import ShapeGroup, Source

CUBLAS_BYTES = 64 << 20
"""cuBLAS keeps 32 MiB for each stream that it works on: the current and the captured one."""
SERVED_TOKENS = 8192
"""Prompt tokens of a step of more sequences."""
DECODED_BYTES = 12
"""Bytes for each weight of a matrix that torch decodes: two numbers in float32, and the weight."""


def device_budget(
    source: Source, memory: float | int, *, context: int, batch: int, tokens: int | None = None
) -> SlotBudget:
    """The slots that `memory` pays for on a GPU. tokens: of all sequences, where the key/value
    cache has room for fewer than batch x context.

    A fraction counts experts. Bytes are for everything on the device: key/value cache, workspaces
    and graphs too; weights other than experts move to host memory where the least slots would not
    fit beside them. Slots hold experts in codes as they are stored if kernels run them, else their
    plain weights. Raises ValueError as `slot_budget` and `require_pages` do.
    """
    if tokens is not None:
        config: Any = source.model.config
        require_pages(config.get_text_config(decoder=True), tokens)
    sizes = slot_bytes(source)
    if isinstance(memory, float):
        return slot_budget(memory, source, slot_bytes=sizes)
    reserved = reserved_bytes(source, context=context, batch=batch, tokens=tokens)
    least = sum(
        size * max(source.layers[index].top_k for index in group.layers)
        for size, group in zip(sizes, source.groups, strict=True)
    )
    short = max(source.fixed_bytes + least - (memory - reserved), 0)
    host_bytes = short if short <= movable_bytes(source.model) else 0
    return slot_budget(memory, source, slot_bytes=sizes, reserved=reserved, host_bytes=host_bytes)


def slot_bytes(source: Source) -> list[int]:
    """Bytes of an expert in a slot, by group; one that will be packed counts as it is."""
    layout = common_layout(source)
    return [
        2 * block_of(group.specs, group.coding, layout).stored_units
        if isinstance(layout, KernelLayout) and group.coding
        else expert_bytes(group.specs)
        for group in source.groups
    ]


def reserved_bytes(source: Source, *, context: int, batch: int, tokens: int | None = None) -> int:
    """Bytes beside weights and slots: key/value cache, the activations of a prompt that fills it,
    and the buffers of kernels and copies.
    """
    config: Any = source.model.config
    text = config.get_text_config(decoder=True)
    dtype = next(source.model.parameters()).dtype
    sizes = [expert_bytes(group.specs) for group in source.groups]
    top_k = max(layer.top_k for layer in source.layers)
    width = max(max(spec.shape) for group in source.groups for spec in group.specs.values())
    activations = _tokens_of_a_pass(context, batch, tokens) * (
        top_k * (text.hidden_size + width) + 8 * text.hidden_size
    )
    logits = 4 * batch * text.vocab_size * 4
    cache = storage_bytes(source.model, batch, context, tokens)
    decodes = isinstance(common_layout(source), str)
    landing = max(map(landing_bytes, source.groups)) if decodes else 0
    return (
        CUBLAS_BYTES
        + workspace_bytes(max(sizes))
        + landing
        + activations * dtype.itemsize
        + logits
        + cache
    )


def _tokens_of_a_pass(context: int, batch: int, tokens: int | None) -> int:
    """The most tokens that run together: prompts that fill the key/value cache, as `generate` runs
    them; where only serving fills it, those that it lets join a step.
    """
    room = context * batch if tokens is None else tokens
    if batch <= LARGEST_BATCH:
        return room
    return min(room, max(context, SERVED_TOKENS) + batch)


def landing_bytes(group: ShapeGroup) -> int:
    """Bytes for decoding on arrival: of one block, and of what torch makes of its largest matrix
    meanwhile.
    """
    sizes = [math.prod(matrix.shape) for matrix in group.coding.values()]
    return expert_bytes(group.stored_specs) + DECODED_BYTES * max(sizes) if sizes else 0
