"""The figures of every contender at every cache size: over all tokens, and by label."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from routing.names import told_apart
from runtime.comparison.contenders import OPTIMUM, Field, simulations
from runtime.comparison.counts import StepCounts, count_contender, count_simulation, requests_of
from runtime.comparison.settings import CompareSettings
from runtime.simulation.gap import best_free_rule, gap_closed
from runtime.simulation.link_model import Machine
from runtime.simulation.replay import slots_of

ALL = "all"
"""The label of figures over all tokens."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one contender at one cache size; docs/protocol.md defines them.

    None where a figure does not apply.
    """

    contender: str
    residency: float
    label: str
    tokens: int
    hit_rate: float
    recall_at_k: float | None
    recall_at_c: float | None
    gap_lru: float | None
    """Share of the gap from LRU to Belady that is closed."""
    gap_best: float | None
    """Share of the gap from the best free rule, in hindsight, to Belady."""
    mb_per_token: float
    ms_per_token: float | None
    ms_priced: float | None
    """Time of a token with priced prefetching."""
    timely: float | None
    """Share of the used prefetches that had arrived in time."""
    wasted_mb: float | None
    """Prefetched for nothing, per token."""

    def as_dict(self) -> dict[str, Any]:
        """The figures in JSON types."""
        return asdict(self)


def compare(field: Field, settings: CompareSettings) -> Iterator[Figures]:
    """Run everything at every cache size: sizes in order, in each the labels, `all` first."""
    machine = Machine(expert_ms=settings.expert_mb / settings.link_gb_s, layer_ms=settings.layer_ms)
    first_N, label_N = _steps(field)
    empties = first_N if settings.cache == "emptied" else np.zeros_like(first_N)
    counted_N = _counted(first_N, settings)
    if not counted_N.any():
        raise ValueError(f"--warm-up {settings.warm_up} leaves no token to count: lower it")
    requests_N = requests_of(field.calls)
    for residency in settings.residency:
        counts = _count(field, residency, empties, machine)
        for label in [ALL, *dict.fromkeys(label_N[counted_N].tolist())]:
            mask = counted_N if label == ALL else counted_N & (label_N == label)
            if requests_N[mask].sum():
                yield from _rows(counts, requests_N, mask, label, residency, settings.expert_mb)


def _steps(field: Field) -> tuple[np.ndarray, np.ndarray]:
    """For each step, whether it is the first of its document, and the document's label."""
    pairs = list(zip(field.sample.documents, field.sample.steps, strict=True))
    first = [index == 0 for _, steps in pairs for index in range(len(steps))]
    names = [f"{ALL} (label)" if d.label == ALL else d.label for d, _ in pairs]
    labels = [name for name, (_, steps) in zip(names, pairs, strict=True) for _ in steps]
    return np.array(first), np.array(labels, object)


def _counted(first_N: np.ndarray, settings: CompareSettings) -> np.ndarray:
    """Whether a step comes after the warm-up."""
    numbers = np.arange(len(first_N))
    if settings.cache == "emptied":
        numbers = numbers - np.maximum.accumulate(np.where(first_N, numbers, 0))
    counted: np.ndarray = numbers >= settings.warm_up
    return counted


def _count(
    field: Field, residency: float, empties: np.ndarray, machine: Machine
) -> dict[str, StepCounts]:
    """The counts of everything at one cache size, by name."""
    num_slots = slots_of(residency, field.shape)
    most = max(len(experts) for step in field.calls for _, experts in step)
    if num_slots < most:
        raise ValueError(
            f"--residency {residency:g} is {num_slots} of {field.shape[0]} x {field.shape[1]} "
            f"experts, but a layer needs {most} at once: give more"
        )
    counts = {
        contender.name: count_contender(
            contender, field.calls, empties, field.shape, num_slots, machine
        )
        for contender in field.contenders
    }
    for name, simulation in simulations(field.shape, num_slots, field.calls).items():
        found = count_simulation(simulation, field.calls, empties)
        if found is not None:
            counts[name] = found
    return counts


def _rows(
    counts: Mapping[str, StepCounts],
    requests_N: np.ndarray,
    mask: np.ndarray,
    label: str,
    residency: float,
    expert_mb: float,
) -> Iterator[Figures]:
    total, tokens = requests_N[mask].sum(), int(mask.sum())
    hit_rates = {name: 1 - of.loads[mask].sum() / total for name, of in counts.items()}
    best = best_free_rule(hit_rates) or "lru"

    def share(values: np.ndarray | None, of: float) -> float | None:
        return None if values is None or not of else float(values[mask].sum() / of)

    for name, of in counts.items():
        useful = used_prefetches(of)
        arrived = 0.0 if useful is None else float(useful[mask].sum())
        wasted = None if of.prefetched is None or useful is None else of.prefetched - useful
        mb_wasted = share(wasted, tokens)
        yield Figures(
            contender=name,
            residency=residency,
            label=label,
            tokens=tokens,
            hit_rate=float(hit_rates[name]),
            recall_at_k=share(of.found_k, total),
            recall_at_c=share(of.found_c, total),
            gap_lru=_closed(hit_rates[name], hit_rates["lru"], hit_rates[OPTIMUM]),
            gap_best=_closed(hit_rates[name], hit_rates[best], hit_rates[OPTIMUM]),
            mb_per_token=float(of.loads[mask].sum() / tokens * expert_mb),
            ms_per_token=share(of.ms, tokens),
            ms_priced=share(of.ms_priced, tokens),
            timely=share(of.timely, arrived),
            wasted_mb=None if mb_wasted is None else mb_wasted * expert_mb,
        )


def used_prefetches(of: StepCounts) -> np.ndarray | None:
    """Prefetched experts that the step did use, [N]."""
    return None if of.timely is None or of.late is None else of.timely + of.late


def _closed(hit_rate: float, floor: float, optimum: float) -> float | None:
    """The share of the way from `floor` to `optimum`; None where there is hardly any way."""
    closed = gap_closed(hit_rate, floor, optimum)
    return float(closed) if math.isfinite(closed) and optimum - floor > 1e-9 else None


def of_size(figures: Sequence[Figures], residency: float, label: str = ALL) -> list[Figures]:
    """The rows of one cache size and label, in the order of the contenders."""
    return [row for row in figures if (row.residency, row.label) == (residency, label)]


def detailed(figures: Sequence[Figures], settings: CompareSettings) -> list[str]:
    """The contenders to show by label. Raises ValueError for one that there is not."""
    rows = of_size(figures, figures[0].residency)
    names = [row.contender for row in rows]
    if unknown := [name for name in settings.detailed if name not in names]:
        raise ValueError(f"--detailed: no contender {', '.join(unknown)}, but {', '.join(names)}")
    predictors = told_apart(settings.predictors, lambda path: path.stem)
    below = [row for row in rows if not row.contender.startswith(OPTIMUM)]
    best = max(below, key=lambda row: row.hit_rate).contender
    return settings.detailed or predictors or [best]
