"""The loss of a prepared model whose experts are not those of its original any more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONVERSION = "conversion.json"
"""The report of the conversion, in the prepared directory."""


def describe_loss(encoding: str, change: float | None) -> str:
    """One line. change: relative, of the perplexity; None where it was not measured."""
    measured = "its loss was not measured" if change is None else f"perplexity {change:+.2%}"
    return f"lossy {encoding}, {measured.replace('%', ' %')}"


def read_loss(directory: Path, encoding: str) -> str:
    """The line about the loss of a lossy prepared model.

    encoding: of its experts. Raises ValueError for a report that is damaged or of another encoding.
    """
    path = directory / CONVERSION
    if not path.is_file():
        return describe_loss(encoding, None)
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        quality = report["quality"]
        change = None if quality is None else float(quality["change"])
        if report["encoding"] != encoding:
            raise ValueError(f"it is about {report['encoding']}, the experts are in {encoding}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a report of this model's conversion ({error}); convert it again"
        ) from error
    return describe_loss(encoding, change)
