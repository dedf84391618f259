"""The numbers of sequences that a GPU's memory has room for, and how fast each could be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from runtime.cuda.device_budget import device_budget, reserved_bytes
from runtime.cuda.options import LARGEST_BATCH, WIDE_SIZES
from runtime.kv.size import page_bytes, storage_bytes
from runtime.kv.state_kinds import fits_pages
from runtime.kv.storage import StorageSize
from runtime.sizing.budget import SlotBudget
from runtime.sizing.cache_tokens import fewer_than, spilled_of
from runtime.sizing.host_memory import available_bytes
from runtime.sizing.link import measure_link
from runtime.sizing.row_plan import RowChoice
from runtime.weights.source import Source

ROWS = 8, 16, LARGEST_BATCH, *WIDE_SIZES
BLOCK_BYTES = 4 << 20
"""Of the copies that measure the link."""
COPIED_BYTES = 1 << 28
COPIES = 4
PACKED_SHARE = 0.75
"""Bytes of packed bfloat16 experts over those of plain ones, as a rule."""
HOST_SHARE = 0.5
"""Of the host memory that is free beside the experts, what spilled keys and values may take."""
LEFT_FREE = 0.9
"""Of the memory that is free, what a share of the experts may take with all that is beside them."""


def row_choices(
    source: Source,
    memory: float | int,
    *,
    context: int,
    most: int,
    device: torch.device,
    tokens_of: Callable[[int], int | None] = lambda _: None,
    spill_tokens: int | None = 0,
) -> Iterator[RowChoice]:
    """Those up to the next number above `most` that fit. memory: as for `device_budget`. tokens_of:
    tokens that so many sequences have together; None: `context` each. spill_tokens: of host memory;
    None: as many as that has room for, where the device's has not.
    """
    link, bandwidth = measure_link(device, BLOCK_BYTES), device_bandwidth(device)
    free = LEFT_FREE * torch.cuda.mem_get_info(device)[0] if isinstance(memory, float) else None
    pages = fits_pages(source.model.config.get_text_config(decoder=True))  # type: ignore[union-attr,operator]
    room = _host_room(source) if pages and spill_tokens is None else 0
    last: int | None = None
    """Tokens on the device, of the most sequences whose tokens all fit there."""
    for rows in ROWS:
        asked = fewer_than(rows * context, tokens_of(rows) if pages else None)
        sizes = StorageSize(rows, context, asked, spilled_of(rows * context, asked, spill_tokens))
        choice = _fitting(source, memory, sizes, free, link, bandwidth)
        if choice is None and asked is not None and last is not None:
            sizes = StorageSize(rows, context, last, asked - last)
            if page_bytes(source.model, sizes.spilled) <= room:
                choice = _fitting(source, memory, sizes, free, link, bandwidth)
        elif choice is not None:
            last = choice.cache_tokens
        if choice is None:
            return
        yield choice
        if rows >= most:
            return


def _host_room(source: Source) -> float:
    """Bytes of host memory that spilled pages may take beside all experts."""
    experts = source.mean_stored_bytes * sum(layer.num_experts for layer in source.layers)
    return HOST_SHARE * (available_bytes() - experts)


def _fitting(
    source: Source, memory: float | int, sizes: StorageSize, free: float | None, link: float,
    bandwidth: float,
) -> RowChoice | None:  # fmt: skip
    """The choice of that size; None where it does not fit, into `free` bytes if they are given."""
    try:
        budget = device_budget(
            source, memory, context=sizes.context, batch=sizes.batch, tokens=sizes.tokens
        )
    except ValueError:
        return None
    choice, num_bytes = choice_of(source, budget, sizes, link, bandwidth)
    return None if free is not None and num_bytes > free else choice


def choice_of(
    source: Source, budget: SlotBudget, cache: StorageSize, link: float, bandwidth: float
) -> tuple[RowChoice, int]:
    """A number of sequences, and the bytes that it takes on the device."""
    share = stored_share(source)
    sizes = [int(size * share) for size in budget.slot_bytes]
    slots = budget.slots(share)
    pairs = list(zip(sizes, slots, budget.num_experts, strict=True))
    missing = sum(size * (count - held) for size, held, count in pairs)
    weights = source.fixed_bytes + sum(size * count for size, _, count in pairs)
    states = storage_bytes(source.model, cache.batch, cache.context, cache.tokens)
    device_s = (weights + states / 2) / bandwidth
    spilled = page_bytes(source.model, cache.spilled) if cache.spilled else 0
    link_s = (missing + spilled) / link
    choice = RowChoice(cache.batch, sum(slots), link_s, device_s, cache.tokens, cache.spilled)
    reserved = reserved_bytes(source, context=cache.context, batch=cache.batch, tokens=cache.tokens)
    return choice, weights - missing + reserved


def stored_share(source: Source) -> float:
    """Bytes of an expert as it is kept over those counted for its slot: bfloat16 is packed."""
    dtypes = {spec.dtype for group in source.groups for spec in group.specs.values()}
    is_coded = any(group.coding for group in source.groups)
    return PACKED_SHARE if dtypes == {torch.bfloat16} and not is_coded else 1.0


def device_bandwidth(device: torch.device) -> float:
    """Bytes a second that kernels read and write of the device's memory, by copies within it."""
    one = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    other.copy_(one)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(COPIES):
        other.copy_(one)
    end.record()
    end.synchronize()
    return 2 * COPIES * COPIED_BYTES / (begin.elapsed_time(end) / 1e3)
