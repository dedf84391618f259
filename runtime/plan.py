"""Whether a model fits a memory budget, and how it will go, before anything of it is loaded.

python -m runtime.plan MODEL [--memory 8GiB] [--measure]
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from routing.cli import run

if TYPE_CHECKING:
    from routing.layers import MoELayer
    from runtime.loader import Group

HIT_RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
CONTEXTS = (2048, 8192, 32768)
FEW = 0.125


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
    """Where the slots are, for --measure; by default a GPU if there is one."""


class Outline(NamedTuple):
    """A model's sizes, from its configuration and the headers of its files."""

    name: str
    layers: list[MoELayer]
    groups: list[Group]
    fixed_bytes: int
    cache_bytes: dict[int, int | None]
    """Of the key/value cache of one sequence, by context length; None where it cannot be told."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `runtime.load` with this budget takes; sizes in bytes."""

    outline: Outline
    slots: list[int]
    """Of each group of layers of one expert shape."""
    expert_bytes: list[int]
    """Of one expert of each group."""
    total_expert_bytes: int
    least_bytes: int
    """The smallest budget that works."""

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
        return self.outline.fixed_bytes + self.slot_bytes

    def bytes_per_token(self, hit_rate: float) -> float:
        """What one sequence moves for a token at that hit rate."""
        used = sum(
            size * self.outline.layers[layer].top_k
            for size, group in zip(self.expert_bytes, self.outline.groups, strict=True)
            for layer in group.layers
        )
        return used * (1 - hit_rate)


def outline(model: str | Path) -> Outline:
    """Read configuration and headers, and no weights.

    Raises ValueError for a directory that `runtime.load` would refuse.
    """
    from runtime.key_value import cache_bytes
    from runtime.loader import Stock, find_directory, grouped, other_parameters, store_opener

    directory = find_directory(model)
    stock = Stock.of(directory)
    config: Any = stock.model.config
    layers = stock.layers
    store = store_opener(directory, stock)(layers, config.dtype or config.get_text_config().dtype)
    dtype = next(iter(store.specs(0).values())).dtype
    others = other_parameters(stock.model, layers)
    meta = stock.model.to(dtype)
    return Outline(
        name=str(model),
        layers=layers,
        groups=grouped([store.specs(layer) for layer in range(len(layers))]),
        fixed_bytes=sum(p.numel() for p in others) * dtype.itemsize,
        cache_bytes={length: cache_bytes(meta, layers, length) for length in CONTEXTS},
    )


def plan(model: str | Path, memory: float | int | str = 0.25) -> Plan:
    """What `runtime.load(model, memory=memory)` will take. Raises ValueError as it would."""
    from runtime.arena import expert_bytes
    from runtime.budget import least_bytes, parse_memory, slots_per_group, total_expert_bytes

    sizes = outline(model)
    return Plan(
        outline=sizes,
        slots=slots_per_group(parse_memory(memory), sizes),
        expert_bytes=[expert_bytes(group.specs) for group in sizes.groups],
        total_expert_bytes=total_expert_bytes(sizes),
        least_bytes=int(least_bytes(sizes)),
    )


def advice(found: Plan, host_bytes: int) -> list[str]:
    """What to do about it, in sentences. host_bytes: the memory of this machine."""
    from runtime.budget import round_up

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
        f"{round_up(_budget(found, 1))}. The key/value cache comes on top."
    )
    return said


def _budget(found: Plan, fraction: float) -> float:
    return found.outline.fixed_bytes + fraction * found.total_expert_bytes


def main(settings: PlanSettings) -> None:
    """Print the plan."""
    found = plan(settings.model, settings.memory)
    bandwidth = _measured(settings, found) if settings.measure else None
    print(describe(found, bandwidth))
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print("\n".join(advice(found, host_bytes)))


def _measured(settings: PlanSettings, found: Plan) -> float:
    import torch

    from runtime.link import measure_link

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return measure_link(torch.device(device), max(found.expert_bytes))


def describe(found: Plan, bandwidth: float | None) -> str:
    """The plan as text. bandwidth: of the link, in bytes a second, if it was measured."""
    from runtime.stats import format_bytes

    sizes = found.outline
    experts = [
        f"  {slots:,} of {sum(sizes.layers[i].num_experts for i in group.layers):,} experts of "
        f"{format_bytes(size)} in {len(group.layers)} layers"
        for slots, size, group in zip(found.slots, found.expert_bytes, sizes.groups, strict=True)
    ]
    caches = [
        f"  {length:,} tokens: {'not known' if size is None else format_bytes(size)}"
        for length, size in sizes.cache_bytes.items()
    ]
    return "\n".join(
        [
            f"{sizes.name}: {format_bytes(found.total_expert_bytes)} of experts, "
            f"{format_bytes(sizes.fixed_bytes)} of other weights",
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
    from runtime.stats import format_bytes

    moved = found.bytes_per_token(hit_rate)
    text = f"  {hit_rate:.0%}: {format_bytes(moved)} moved"
    if bandwidth is None:
        return text
    return f"{text}, at most {bandwidth / moved:,.4g} tokens/s over {bandwidth / 1e9:.3g} GB/s"


if __name__ == "__main__":
    run(main, PlanSettings, prog="python -m runtime.plan", positional=["model"])
