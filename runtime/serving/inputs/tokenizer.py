"""The tokenizer of a model that was loaded from a directory, for callers that give none."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from runtime.weights.directory import load_tokenizer

_found: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def own_tokenizer(model: Any) -> Any:
    """The tokenizer in the directory that `model` came from, read once; None where there is none
    that can be used.
    """
    if model not in _found:
        _found[model] = _load(str(getattr(model, "name_or_path", "") or ""))
    return _found[model]


def _load(path: str) -> Any:
    try:
        return load_tokenizer(Path(path)) if path and Path(path).is_dir() else None
    except ValueError:  # without it, text is refused with the name of what is missing
        return None
