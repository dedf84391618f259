"""Sizes in text: reading what users give, and printing bytes for people."""

from __future__ import annotations

import math
import re
from numbers import Real
from typing import Any

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
LEAST_BYTES = 4096
"""A budget of fewer bytes is a number whose unit was forgotten."""


def parse_memory(memory: float | int | str) -> float | int:
    """A memory budget: a fraction in (0, 1] stays a float, a size becomes an int of bytes.

    memory: 0.25, "0.25", "2GiB", "500MB", or a number of bytes. Raises ValueError for anything
    else, and for a number that is too small to be meant in bytes.
    """
    value: Any = _parse_text(memory) if isinstance(memory, str) else memory
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and isinstance(value, float) and 0 < value <= 1:
        return value
    if is_number and 1 <= value < math.inf and int(value) == value:
        if value < LEAST_BYTES and not _has_unit(memory):
            raise ValueError(f"memory={memory!r} would be so many bytes: {_meant(value)}")
        return int(value)
    raise ValueError(
        f"memory={memory!r} is neither a fraction of the experts like 0.25 nor a size like '2GiB'"
    )


def _has_unit(memory: float | int | str) -> bool:
    return isinstance(memory, str) and memory.strip()[-1].isalpha()


def _meant(value: float) -> str:
    """The question to ask about a bare number."""
    size = f"'{value:g}GiB' (a size)"
    if value == 1:
        return f"did you mean 1.0 (all experts) or {size}?"
    if value <= 100:
        return f"did you mean {value / 100:g} ({value:g} % of the experts) or {size}?"
    return f"did you mean '{value:g}MiB' or {size}?"


def parse_size(size: int | str, name: str) -> int:
    """Bytes, from a number of them or a text like "2GiB". Raises ValueError for anything else.

    name: the option to name in the message.
    """
    value: Any = _parse_text(size) if isinstance(size, str) else size
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
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


def round_up(num_bytes: float) -> str:
    """A size that `parse_memory` reads as at least `num_bytes`."""
    unit = next((name for name in ("Gi", "Mi") if num_bytes >= 10 * UNITS[name.upper()]), "Ki")
    return f"{math.ceil(num_bytes / UNITS[unit.upper()] * 10) / 10}{unit}B"


def format_bytes(num_bytes: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"
