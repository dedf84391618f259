"""The number of sequences that a batch decodes together, where the user leaves it open."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from runtime.batch.lengths import Length, tokens_together
from runtime.kv.pages.places import PAGE
from runtime.serving.batch.settings import AS_MANY, BatchSettings
from runtime.serving.settings import ServeSettings
from runtime.sizing.row_plan import RowChoice, best_choice

if TYPE_CHECKING:
    import torch

ON_CPU = ServeSettings.batch


def sized(
    settings: BatchSettings, num_rows: int, lengths: Callable[[], list[Length]] = list
) -> BatchSettings:
    """The settings with a number of sequences for so many rows of a data set. lengths: reads those
    of its requests, so that the key/value cache has room for as many tokens as they need.

    Raises ValueError as `runtime.load` would.
    """
    from runtime.loading import target_device

    if settings.batch != AS_MANY:
        return settings
    device = target_device(settings.device, settings.model)
    if settings.workers or device.type != "cuda":
        return replace(settings, batch=min(ON_CPU, settings.rows))
    choice = _chosen(settings, num_rows, device, lengths)
    print(told(choice), file=sys.stderr)
    return replace(
        settings, batch=choice.rows, rows=choice.rows, chunk=_chunk(settings, choice),
        cache_tokens=choice.cache_tokens, spill_tokens=choice.spill_tokens or None,
    )  # fmt: skip


def told(choice: RowChoice) -> str:
    """The choice in a line."""
    tokens = choice.cache_tokens
    cache = "" if tokens is None else f"in a key/value cache of {tokens:,} tokens, "
    if choice.spill_tokens:
        cache += f"{choice.spill_tokens:,} more in host memory, "
    return (
        f"{choice.rows} sequences decode together, {cache}{choice.slots} experts stay on the GPU: "
        f"{choice.tokens_per_s:,.0f} tokens a second at best, bound by {choice.bound} "
        "(--batch takes another number)"
    )


def _chosen(
    settings: BatchSettings, num_rows: int, device: torch.device,
    lengths: Callable[[], list[Length]],
) -> RowChoice:  # fmt: skip
    from runtime.cuda.row_choices import row_choices
    from runtime.sizing.units import parse_memory
    from runtime.weights.repository.hub import HubOptions
    from runtime.weights.source import from_path_on_meta

    hub = HubOptions(revision=settings.revision, cache_dir=settings.cache_dir)
    source = from_path_on_meta(settings.model, settings.dtype, hub)
    choices = row_choices(
        source, parse_memory(settings.memory), context=settings.context, most=num_rows,
        device=device, tokens_of=_tokens_of(settings, lengths),
        spill_tokens=None if settings.cache_tokens is None else settings.spill_tokens or 0,
    )  # fmt: skip
    found = list(choices)
    if not found:
        raise ValueError(
            f"memory={settings.memory} has no room for {settings.context} tokens of 8 sequences "
            "beside the least experts; give a larger memory=, a smaller context= or batch="
        )
    return best_choice(found)


def _tokens_of(
    settings: BatchSettings, lengths: Callable[[], list[Length]]
) -> Callable[[int], int | None]:
    """Tokens that a number of sequences have together, as far as that is known."""
    if settings.cache_tokens is not None:
        return lambda _: settings.cache_tokens
    return tokens_together(lengths(), settings.context, PAGE)


def _chunk(settings: BatchSettings, choice: RowChoice) -> int:
    """Prompt tokens that join a step: with many sequences a pass has room for more."""
    from runtime.cuda.device_budget import SERVED_TOKENS

    is_default = settings.chunk == BatchSettings.chunk
    return SERVED_TOKENS if is_default and choice.rows > ON_CPU else settings.chunk
