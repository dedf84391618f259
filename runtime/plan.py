"""Plan how a model fits a memory budget, before any of its weights is loaded.

python -m runtime.plan MODEL [--memory 8GiB] [--measure]
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routing.cli import run

if TYPE_CHECKING:
    from runtime.sizing.budget import SlotBudget
    from runtime.sizing.footprint import Footprint
    from runtime.sizing.memory_plan import MemoryPlan
    from runtime.weights.source import Source

PACKED = (
    "As a rule a GPU keeps bfloat16 experts packed, in three quarters of their bytes: a third more "
    "of them fit than are counted here, and a quarter less crosses the link for each."
)


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Say how a model fits a memory budget and how fast it can be, without loading its weights."""

    model: str
    """Model: a directory, a config.json, or an id on the Hub (no weights are fetched)."""
    memory: str = "0.25"
    """The budget as for runtime.load: a size like 8GiB, or a fraction of the experts like 0.25."""
    plot: Path | None = None
    """Draw the parts of the memory into this image file."""
    measure: bool = False
    """Measure the link between host memory and slots, and forecast tokens a second from it."""
    device: str | None = None
    """Device of the slots; by default a GPU if there is one."""
    context: int = 2048
    """Tokens of the longest sequence. On a GPU a size pays for its keys and values too."""
    batch: int = 1
    """Sequences that run at once."""
    cache_tokens: int | None = None
    """On a GPU: tokens of all sequences together; by default batch x context."""
    spill_tokens: int | None = None
    """On a GPU: further ones, in pages of pinned host memory."""
    dtype: str = "auto"
    """Number format of the model; `auto` is the one it is stored in."""
    revision: str | None = None
    """Branch, tag or commit of an id on the Hub. HF_TOKEN opens private ones."""
    cache_dir: str | None = None
    """Folder to keep fetched files in."""


def plan(
    model: str | Path,
    memory: float | int | str = 0.25,
    *,
    device: str = "cpu",
    context: int = 2048,
    batch: int = 1,
    cache_tokens: int | None = None,
    spill_tokens: int | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> MemoryPlan:
    """The memory that `runtime.load` will take. No weights are read, or fetched from the Hub.

    model: as for `load`; also a `config.json`, or a directory that holds no more.

    Raises ValueError as `runtime.load` would.
    """
    from runtime.kv.size import page_bytes
    from runtime.sizing.cache_tokens import (
        fewer_than,
        refuse_spill_tokens,
        require_cache_tokens,
        require_spill_tokens,
        spilled_of,
    )
    from runtime.sizing.memory_plan import MemoryPlan
    from runtime.weights.repository.hub import HubOptions
    from runtime.weights.source import from_path_on_meta

    hub = HubOptions(revision=revision, token=token, cache_dir=cache_dir)
    source = from_path_on_meta(model, dtype, hub)
    require_cache_tokens(cache_tokens, context)
    require_spill_tokens(spill_tokens, cache_tokens)
    if not device.startswith("cuda"):
        refuse_spill_tokens(spill_tokens)
    tokens = fewer_than(batch * context, cache_tokens)
    budget = _budget(source, memory, device, context=context, batch=batch, tokens=tokens)
    spilled = spilled_of(batch * context, cache_tokens, spill_tokens)
    num_bytes = page_bytes(source.model, spilled) if spilled else 0
    return MemoryPlan.of(source, budget, str(model), num_bytes)


def _budget(source: Source, memory: float | int | str, device: str, **sizes: Any) -> SlotBudget:
    """Slots as `runtime.load` counts them: on a GPU, bytes pay for cache and workspace too."""
    from runtime.sizing.budget import slot_budget
    from runtime.sizing.units import parse_memory

    budget = parse_memory(memory)
    if device.startswith("cuda"):
        from runtime.cuda.device_budget import device_budget

        return device_budget(source, budget, **sizes)
    return slot_budget(budget, source)


def main(settings: PlanSettings) -> None:
    """Print the plan and the advice."""
    import torch

    from runtime.sizing.link import measure_link
    from runtime.sizing.memory_plan import advice, describe

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = (
        "context", "batch", "cache_tokens", "spill_tokens", "dtype", "revision", "cache_dir",
    )  # fmt: skip
    options: dict[str, Any] = {name: getattr(settings, name) for name in names}
    planned = plan(settings.model, settings.memory, device=device, **options)
    bandwidth = None
    if settings.measure:
        bandwidth = measure_link(torch.device(device), max(planned.expert_bytes))
    print(describe(planned, bandwidth))
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print("\n".join(advice(planned, host_bytes)))
    if device.startswith("cuda") and planned.source.encoding is None:
        print(PACKED)
    _show_parts(settings, planned, device)


def _show_parts(settings: PlanSettings, planned: MemoryPlan, device: str) -> None:
    """Print the parts of the memory as bars, and draw them where that was asked for."""
    from rich.console import Console

    from runtime.sizing.cache_tokens import fewer_than
    from runtime.sizing.footprint import bars, draw
    from runtime.sizing.units import format_bytes

    tokens = fewer_than(settings.batch * settings.context, settings.cache_tokens)
    parts = footprint(planned, settings.memory, device, settings.context, settings.batch, tokens)
    Console(highlight=False).print("\n", bars(parts), sep="", end="", soft_wrap=True)
    if settings.plot is not None:
        title = (
            f"{planned.name}: {sum(planned.slots):,} experts in slots ({planned.fraction:.1%}), "
            f"{format_bytes(planned.total_stored_bytes)} of experts; {settings.batch} x "
            f"{settings.context:,} tokens" + (f", {tokens:,} in all" if tokens else "")
        )
        draw(parts, title, settings.plot)
        print(f"picture: {settings.plot}")


def footprint(
    planned: MemoryPlan, memory: float | int | str, device: str, context: int, batch: int,
    tokens: int | None = None,
) -> Footprint:  # fmt: skip
    """The parts of the memory that a plan takes with `batch` sequences of `context` tokens. tokens:
    of all of them, where a GPU's key/value cache has room for fewer.
    """
    from runtime.kv.size import cache_bytes, storage_bytes
    from runtime.sizing.footprint import footprint_of
    from runtime.sizing.units import parse_memory

    source = planned.source
    if not device.startswith("cuda"):
        one = cache_bytes(source.model, source.layers, context)
        cache = None if one is None else one * batch
        return footprint_of(planned, on_gpu=False, cache=cache)
    from runtime.cuda.device_budget import reserved_bytes

    given = parse_memory(memory)
    budget = given if isinstance(given, int) else None
    cache = storage_bytes(source.model, batch, context, tokens)
    workspace = reserved_bytes(source, context=context, batch=batch, tokens=tokens) - cache
    return footprint_of(planned, on_gpu=True, cache=cache, workspace=workspace, budget=budget)


if __name__ == "__main__":
    run(
        main,
        PlanSettings,
        prog="python -m runtime.plan",
        positional=["model"],
        examples=[
            "DIR --memory 8GiB",
            "allenai/OLMoE-1B-7B-0924 --memory 0.25 --measure",
            "DIR --memory 8GiB --device cuda --context 8192 --batch 4 --plot memory.png",
        ],
    )
