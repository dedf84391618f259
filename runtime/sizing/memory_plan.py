"""A memory plan: the bytes that a model takes, its traffic per token, and advice on both."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.kv.size import cache_bytes
from runtime.sizing.budget import SlotBudget, least_bytes, total_expert_bytes
from runtime.sizing.units import format_bytes, round_up
from runtime.weights.arena import expert_bytes
from runtime.weights.encodings.coded import bits_a_weight
from runtime.weights.source import Source
from runtime.weights.store import ConfiguredStore

HIT_RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
CONTEXTS = (2048, 8192, 32768)
SMALLER = 0.9
"""Share of the bytes in a slot below which the stored ones are mentioned; padding is none."""
PLAIN_BITS = 16
"""Bits of a weight in bfloat16."""
LOW_FRACTION = 0.125
"""Fraction of the experts below which hit rates are expected to be low."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The memory that `runtime.load` takes with a budget; sizes in bytes."""

    name: str
    """Model: a directory or an id on the Hub."""
    source: Source
    """The model on the meta device."""
    slots: list[int]
    """Number of slots, by group of layers of one expert shape (`Source.groups`)."""
    expert_bytes: list[int]
    """Size of one expert in a slot, by group."""
    stored_bytes: list[int]
    """Size of one expert as it is stored and moved, by group: in codes where it has any."""
    total_expert_bytes: int
    """Size of all experts of all layers in slots."""
    least_bytes: int
    """The smallest budget that works, for weights and slots."""
    moved_bytes: int = 0
    """Weights other than experts that stay in host memory."""
    spilled_bytes: int = 0
    """Pages of the key/value cache in host memory, where there may be any."""
    cache_bytes: dict[int, int | None]
    """Size of the key/value cache of one sequence, by context length; None if it is not known."""

    @classmethod
    def of(
        cls, source: Source, budget: SlotBudget, name: str, spilled_bytes: int = 0
    ) -> MemoryPlan:
        """The plan for a model on the meta device, given what its budget pays for."""
        sizes = budget.slot_bytes
        return cls(
            name=name,
            source=source,
            slots=budget.slots(),
            expert_bytes=sizes,
            stored_bytes=[expert_bytes(group.stored_specs) for group in source.groups],
            total_expert_bytes=total_expert_bytes(source, sizes),
            least_bytes=int(least_bytes(source, sizes)),
            moved_bytes=budget.host_bytes,
            spilled_bytes=spilled_bytes,
            cache_bytes={n: cache_bytes(source.model, source.layers, n) for n in CONTEXTS},
        )

    @property
    def fraction(self) -> float:
        """The share of the experts' bytes that is resident."""
        return self.slot_bytes / self.total_expert_bytes

    @property
    def total_stored_bytes(self) -> int:
        """Size of all experts of all layers as they are stored."""
        return sum(
            size * sum(self.source.layers[layer].num_experts for layer in group.layers)
            for size, group in zip(self.stored_bytes, self.source.groups, strict=True)
        )

    @property
    def slot_bytes(self) -> int:
        """Size of all slots."""
        return sum(a * b for a, b in zip(self.slots, self.expert_bytes, strict=True))

    @property
    def resident_bytes(self) -> int:
        """Size of all weights but the experts, and of the slots."""
        return self.source.fixed_bytes + self.slot_bytes

    def bytes_per_token(self, hit_rate: float) -> float:
        """Expert bytes that one sequence moves per token at that hit rate."""
        used = sum(
            size * self.source.layers[layer].top_k
            for size, group in zip(self.stored_bytes, self.source.groups, strict=True)
            for layer in group.layers
        )
        return used * (1 - hit_rate)

    def budget(self, fraction: float) -> float:
        """The budget in bytes that keeps `fraction` of the experts resident."""
        return self.source.fixed_bytes + fraction * self.total_expert_bytes


def advice(plan: MemoryPlan, host_bytes: int) -> list[str]:
    """Advice on the budget, one sentence a line. host_bytes: the memory of this machine."""
    lines = []
    if plan.fraction == 1:
        lines.append("Everything fits: without ExpertFlow the model is as fast or faster.")
    elif plan.fraction < LOW_FRACTION:
        lines.append(
            f"Only {plan.fraction:.0%} of the experts are resident, and hit rates will be low: "
            f"an eighth of them needs {round_up(plan.budget(LOW_FRACTION))}."
        )
    if plan.total_stored_bytes > host_bytes:
        lines.append(
            "The experts are larger than this machine's memory: some misses will wait for the disk."
        )
    elif plan.spilled_bytes and plan.total_stored_bytes + plan.spilled_bytes > host_bytes:
        lines.append(
            "Experts and spilled keys and values are larger than this machine's memory, "
            f"{format_bytes(host_bytes)}: loading will refuse it; give fewer spill_tokens."
        )
    lines.append(
        f"The least that works is {round_up(plan.least_bytes)}; all experts resident is "
        f"{round_up(plan.budget(1))}, for weights and slots alone."
    )
    return lines


def describe(plan: MemoryPlan, bandwidth: float | None) -> str:
    """The plan as text. bandwidth: of the link, in bytes a second; None if not measured."""
    source = plan.source
    experts = [_group(plan, index) for index in range(len(source.groups))]
    caches = [
        f"  {length:,} tokens: {'not known' if size is None else format_bytes(size)}"
        for length, size in plan.cache_bytes.items()
    ]
    return "\n".join(
        [
            f"{plan.name}: {format_bytes(plan.total_stored_bytes)} of experts, "
            f"{format_bytes(source.fixed_bytes)} of other weights",
            f"resident: {format_bytes(plan.resident_bytes)}, of which slots "
            f"{format_bytes(plan.slot_bytes)} ({plan.fraction:.1%} of the experts)",
            *experts,
            *_encodings(source),
            *_spilled(plan),
            "key/value cache of one sequence",
            *caches,
            "experts moved per token of one sequence, by hit rate",
            *(_traffic(plan, hit_rate, bandwidth) for hit_rate in HIT_RATES),
        ]
    )


def _group(plan: MemoryPlan, index: int) -> str:
    """One line of `describe`: the slots of a group, and the size of its experts."""
    layers, size = plan.source.groups[index].layers, plan.expert_bytes[index]
    count = sum(plan.source.layers[layer].num_experts for layer in layers)
    text = f"  {plan.slots[index]:,} of {count:,} experts of {format_bytes(size)}"
    if plan.stored_bytes[index] < SMALLER * size:
        text += f" (stored in {format_bytes(plan.stored_bytes[index])})"
    return f"{text} in {len(layers)} layers"


def _spilled(plan: MemoryPlan) -> list[str]:
    """A line of `describe` about pages in host memory, if there can be any."""
    if not plan.spilled_bytes:
        return []
    return [f"pinned host memory for spilled keys and values: {format_bytes(plan.spilled_bytes)}"]


def _encodings(source: Source) -> list[str]:
    """Lines of `describe` about experts in codes, one for each size of them."""
    bits = {
        (matrix.encoding.name, bits_a_weight(group.coding))
        for group in source.groups
        for matrix in group.coding.values()
    }
    loss = source.store.loss
    whose = "the checkpoint's own" if loss is None else f"{loss};"
    lines = [
        f"{whose} {name}: {number:.4g} bits a weight, "
        f"{PLAIN_BITS / number:.3g} x smaller than bfloat16"
        for name, number in sorted(bits)
    ]
    if isinstance(source.store, ConfiguredStore) and source.store.quantization is not None:
        method = source.store.quantization.get("quant_method")
        lines.append(
            f"The weights are quantised ({method}): the files, which are not here, say in how many "
            "bits. Counted here are experts as they are decoded."
        )
    return lines


def _traffic(plan: MemoryPlan, hit_rate: float, bandwidth: float | None) -> str:
    """One line of `describe`: the bytes a token moves, and the speed that they allow."""
    moved = plan.bytes_per_token(hit_rate)
    text = f"  {hit_rate:.0%}: {format_bytes(moved)} moved"
    if bandwidth is None:
        return text
    return f"{text}, at most {bandwidth / moved:,.4g} tokens/s over {bandwidth / 1e9:.3g} GB/s"
