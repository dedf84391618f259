"""Memory budgets: from what the user says to a number of slots."""

from __future__ import annotations

import math
import re
from numbers import Real
from typing import Any

from runtime.cache.stats import format_bytes
from runtime.weights.arena import expert_bytes
from runtime.weights.source import Source

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_memory(memory: float | int | str) -> float | int:
    """A fraction in (0, 1] stays a float; sizes ("2GiB", "500MB", bytes) become an int of bytes.

    Raises ValueError for anything else.
    """
    value: Any = _parse_text(memory) if isinstance(memory, str) else memory
    is_number = isinstance(value, Real) and value is not True
    if is_number and isinstance(value, float) and 0 < value <= 1:
        return value
    if is_number and 1 <= value < math.inf and int(value) == value:
        return int(value)
    raise ValueError(
        f"memory={memory!r} is neither a fraction of the experts like 0.25 nor a size like '2GiB'"
    )


def parse_size(size: int | str, name: str) -> int:
    """Bytes, from a number of them or a text like "2GiB". Raises ValueError for anything else."""
    value: Any = _parse_text(size) if isinstance(size, str) else size
    if isinstance(value, int) and value is not True and value > 0:
        return value
    raise ValueError(f"{name}={size!r} is no size: give bytes, or text like '256MiB'")


def _parse_text(text: str) -> float | int | None:
    match = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*([KMGT]I?)?(B?)\s*", text, re.IGNORECASE)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:  # two points
        return None
    if match is None or not math.isfinite(number):
        return None
    has_unit = bool(match[2] or match[3])
    return int(number * UNITS[(match[2] or "").upper()]) if has_unit or number > 1 else number


def slots_per_group(memory: float | int, source: Source, *, off_device: int = 0) -> list[int]:
    """Slots for each group of layers of one expert shape (`Source.groups`).

    A fraction counts experts; bytes pay for the model's other weights first. Several groups share
    by the bytes of their experts. off_device: bytes of the other weights that stay in host memory.
    Raises ValueError when a group would get fewer slots than a layer's top-k.
    """
    counts, least = _counts(source), _least(source)
    total, fixed = total_expert_bytes(source), source.fixed_bytes - off_device
    fraction = memory if isinstance(memory, float) else (memory - fixed) / total
    slots = [min(int(count * fraction + 1e-9), count) for count in counts]
    if any(got < need for got, need in zip(slots, least, strict=True)):
        raise ValueError(
            f"memory={_say(memory)} leaves {max(min(slots), 0)} expert slots, but a token needs "
            f"{max(least)} in one layer; give at least "
            f"{math.ceil(_least_fraction(source) * 1e4) / 1e4} (a fraction of the experts) or "
            f"{round_up(least_bytes(source) - off_device)}"
        )
    return slots


def total_expert_bytes(source: Source) -> int:
    """Bytes of all experts of all layers."""
    sizes = [expert_bytes(group.specs) for group in source.groups]
    return sum(size * count for size, count in zip(sizes, _counts(source), strict=True))


def least_bytes(source: Source) -> float:
    """The smallest budget: other weights, and slots for the top-k of one layer of each group."""
    spare = sum(expert_bytes(group.specs) for group in source.groups)
    return source.fixed_bytes + _least_fraction(source) * total_expert_bytes(source) + spare


def _counts(source: Source) -> list[int]:
    return [sum(source.layers[i].num_experts for i in group.layers) for group in source.groups]


def _least(source: Source) -> list[int]:
    return [max(source.layers[i].top_k for i in group.layers) for group in source.groups]


def _least_fraction(source: Source) -> float:
    return max(k / count for k, count in zip(_least(source), _counts(source), strict=True))


def round_up(num_bytes: float) -> str:
    """A size that `parse_memory` reads as at least `num_bytes`."""
    unit = next((name for name in ("Gi", "Mi") if num_bytes >= 10 * UNITS[name.upper()]), "Ki")
    return f"{math.ceil(num_bytes / UNITS[unit.upper()] * 10) / 10}{unit}B"


def _say(memory: float | int) -> str:
    return str(memory) if isinstance(memory, float) else format_bytes(memory)
