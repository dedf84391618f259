"""Memory budgets: from what the user says to a number of slots."""

from __future__ import annotations

import math
import re

from runtime.arena import expert_bytes
from runtime.loader import Source
from runtime.stats import format_bytes

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_memory(memory: float | int | str) -> float | int:
    """A fraction in (0, 1] stays a float; sizes ("2GiB", "500MB", bytes) become an int of bytes.

    Raises ValueError for anything else.
    """
    if isinstance(memory, str):
        memory = _parse_text(memory)
    if isinstance(memory, float) and 0 < memory <= 1:
        return memory
    if memory >= 1 and int(memory) == memory and not isinstance(memory, bool):
        return int(memory)
    raise ValueError(
        f"memory={memory!r} is neither a fraction of the experts in (0, 1] nor a size like '2GiB'"
    )


def _parse_text(text: str) -> float | int:
    match = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*([KMGT]I?)?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(
            f"memory={text!r} is neither a fraction of the experts like 0.25 nor a size like '2GiB'"
        )
    number, unit = float(match[1]), (match[2] or "").upper()
    has_unit = bool(unit) or text.strip().upper().endswith("B")
    return int(number * UNITS[unit]) if has_unit or number > 1 else number


def slots_per_group(memory: float | int, source: Source) -> list[int]:
    """Slots for each group of layers of one expert shape (`Source.groups`).

    A fraction counts experts; bytes pay for the model's other weights first. Several groups share
    by the bytes of their experts. Raises ValueError when a group would get fewer slots than a
    layer's top-k.
    """
    sizes = [expert_bytes(group.specs) for group in source.groups]
    counts = [sum(source.layers[i].num_experts for i in group.layers) for group in source.groups]
    least = [max(source.layers[i].top_k for i in group.layers) for group in source.groups]
    total, fixed = sum(a * b for a, b in zip(sizes, counts, strict=True)), source.fixed_bytes
    fraction = memory if isinstance(memory, float) else (memory - fixed) / total
    slots = [min(int(count * fraction + 1e-9), count) for count in counts]
    if any(got < need for got, need in zip(slots, least, strict=True)):
        need = max(k / count for k, count in zip(least, counts, strict=True))
        size = format_bytes(fixed + need * total + sum(sizes))
        raise ValueError(
            f"memory={_say(memory)} leaves {max(min(slots), 0)} expert slots, but a token needs "
            f"{max(least)} in one layer; give at least {math.ceil(need * 1e4) / 1e4} (a fraction "
            f"of the experts) or {size}"
        )
    return slots


def _say(memory: float | int) -> str:
    return str(memory) if isinstance(memory, float) else format_bytes(memory)
