"""Whether a model fits a memory budget, and how it will go, before anything of it is loaded.

python -m runtime.plan MODEL [--memory 8GiB] [--measure]
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from routing.cli import run

if TYPE_CHECKING:
    from runtime.weights.source import Source

HIT_RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
CONTEXTS = (2048, 8192, 32768)
FEW = 0.125
PACKED = (
    "As a rule a GPU keeps bfloat16 experts packed, in three quarters of their bytes: a third more "
    "of them fit than are counted here, and a quarter less crosses the link for each."
)


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Say whether a model fits a memory budget and how it will go, without loading its weights."""

    model: str
    """Model: a directory or an id on the Hub (which is fetched first)."""
    memory: str = "0.25"
    """The budget as for runtime.load: a size like 8GiB, or a fraction of the experts like 0.25."""
    measure: bool = False
    """Measure the link between host memory and slots, and forecast tokens a second from it."""
    device: str | None = None
    """Where the slots are; by default a GPU if there is one."""
    context: int = 2048
    """On a GPU, where a size pays for the key/value cache too: tokens of the longest sequence."""
    batch: int = 1
    """On a GPU: sequences at once."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `runtime.load` with this budget takes; sizes in bytes."""

    name: str
    source: Source
    """The model on the meta device."""
    slots: list[int]
    """Of each group of layers of one expert shape."""
    expert_bytes: list[int]
    """Of one expert of each group."""
    total_expert_bytes: int
    least_bytes: int
    """The smallest budget that works, for weights and slots."""
    cache_bytes: dict[int, int | None]
    """Of the key/value cache of one sequence, by context length; None where it cannot be told."""

    @property
    def fraction(self) -> float:
        """The share of the experts' bytes that is resident."""
        return self.slot_bytes / self.total_expert_bytes

    @property
    def slot_bytes(self) -> int:
        return sum(a * b for a, b in zip(self.slots, self.expert_bytes, strict=True))

    @property
    def resident_bytes(self) -> int:
        """The weights other than experts, and the slots."""
        return self.source.fixed_bytes + self.slot_bytes

    def bytes_per_token(self, hit_rate: float) -> float:
        """What one sequence moves for a token at that hit rate."""
        used = sum(
            size * self.source.layers[layer].top_k
            for size, group in zip(self.expert_bytes, self.source.groups, strict=True)
            for layer in group.layers
        )
        return used * (1 - hit_rate)


def plan(
    model: str | Path,
    memory: float | int | str = 0.25,
    *,
    device: str = "cpu",
    context: int = 2048,
    batch: int = 1,
) -> Plan:
    """What `runtime.load` will take with these arguments: no weights are read.

    Raises ValueError as `runtime.load` would.
    """
    from runtime.kv.size import cache_bytes
    from runtime.sizing.budget import least_bytes, total_expert_bytes
    from runtime.weights.arena import expert_bytes
    from runtime.weights.source import sketch

    source = sketch(model)
    return Plan(
        name=str(model),
        source=source,
        slots=_slots(source, memory, device, context=context, batch=batch),
        expert_bytes=[expert_bytes(group.specs) for group in source.groups],
        total_expert_bytes=total_expert_bytes(source),
        least_bytes=int(least_bytes(source)),
        cache_bytes={n: cache_bytes(source.model, source.layers, n) for n in CONTEXTS},
    )


def _slots(source: Source, memory: float | int | str, device: str, **sizes: int) -> list[int]:
    """As `runtime.load` counts them: on a GPU, bytes pay for cache and workspace too."""
    from runtime.sizing.budget import slot_budget
    from runtime.sizing.units import parse_memory

    budget = parse_memory(memory)
    if device.startswith("cuda"):
        from runtime.cuda.device_budget import device_budget

        return device_budget(source, budget, **sizes).slots()
    return slot_budget(budget, source).slots()


def advice(found: Plan, host_bytes: int) -> list[str]:
    """What to do about it, in sentences. host_bytes: the memory of this machine."""
    from runtime.sizing.units import round_up

    said = []
    if found.fraction == 1:
        said.append("Everything fits: without ExpertFlow the model is as fast or faster.")
    elif found.fraction < FEW:
        said.append(
            f"Only {found.fraction:.0%} of the experts are resident, and hit rates will be low: "
            f"an eighth of them needs {round_up(_budget(found, FEW))}."
        )
    if found.total_expert_bytes > host_bytes:
        said.append(
            "The experts are larger than this machine's memory: some misses will wait for the disk."
        )
    said.append(
        f"The least that works is {round_up(found.least_bytes)}; all experts resident is "
        f"{round_up(_budget(found, 1))}, for weights and slots alone."
    )
    return said


def _budget(found: Plan, fraction: float) -> float:
    return found.source.fixed_bytes + fraction * found.total_expert_bytes


def main(settings: PlanSettings) -> None:
    """Print the plan."""
    import torch

    from runtime.sizing.link import measure_link

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"context": settings.context, "batch": settings.batch}
    found = plan(settings.model, settings.memory, device=device, **sizes)
    bandwidth = None
    if settings.measure:
        bandwidth = measure_link(torch.device(device), max(found.expert_bytes))
    print(describe(found, bandwidth))
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print("\n".join(advice(found, host_bytes)))
    if device.startswith("cuda"):
        print(PACKED)


def describe(found: Plan, bandwidth: float | None) -> str:
    """The plan as text. bandwidth: of the link, in bytes a second, if it was measured."""
    from runtime.sizing.units import format_bytes

    source = found.source
    experts = [
        f"  {slots:,} of {sum(source.layers[i].num_experts for i in group.layers):,} experts of "
        f"{format_bytes(size)} in {len(group.layers)} layers"
        for slots, size, group in zip(found.slots, found.expert_bytes, source.groups, strict=True)
    ]
    caches = [
        f"  {length:,} tokens: {'not known' if size is None else format_bytes(size)}"
        for length, size in found.cache_bytes.items()
    ]
    return "\n".join(
        [
            f"{found.name}: {format_bytes(found.total_expert_bytes)} of experts, "
            f"{format_bytes(source.fixed_bytes)} of other weights",
            f"resident: {format_bytes(found.resident_bytes)}, of which slots "
            f"{format_bytes(found.slot_bytes)} ({found.fraction:.1%} of the experts)",
            *experts,
            "key/value cache of one sequence",
            *caches,
            "one sequence, for each token, if so many of its experts are resident",
            *(_line(found, hit_rate, bandwidth) for hit_rate in HIT_RATES),
        ]
    )


def _line(found: Plan, hit_rate: float, bandwidth: float | None) -> str:
    from runtime.sizing.units import format_bytes

    moved = found.bytes_per_token(hit_rate)
    text = f"  {hit_rate:.0%}: {format_bytes(moved)} moved"
    if bandwidth is None:
        return text
    return f"{text}, at most {bandwidth / moved:,.4g} tokens/s over {bandwidth / 1e9:.3g} GB/s"


if __name__ == "__main__":
    run(main, PlanSettings, prog="python -m runtime.plan", positional=["model"])
