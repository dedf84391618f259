"""Messages about codes that stand for no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.weights.encodings.stored_matrix import StoredMatrix


def without_scales(directory: Path, key: str, stored: str) -> str:
    """The message about codes of which nothing says what they stand for."""
    return (
        f"{directory}: {key} is stored as {stored}: quantised, but neither its scales nor a "
        "quantization_config say what the codes stand for; fetch the model again, or take its "
        "unquantised twin"
    )


def without_codes(directory: Path, quantization: Mapping[str, Any]) -> str:
    """The message about a directory that says it is quantised, and has no codes."""
    method = quantization.get("quant_method")
    return (
        f"{directory} is quantised ({method}), as its configuration says, but none of its tensors "
        "is in codes: fetch the model again, or remove the quantisation from its configuration"
    )


def describe(matrix: StoredMatrix | None) -> str:
    """A tensor's number format as messages name it."""
    return "plain numbers" if matrix is None else str(matrix.encoding)
