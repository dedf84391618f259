"""The class that a configuration's weights belong to."""

from __future__ import annotations

from typing import Any


def model_class(config: Any) -> Any:
    """Transformers' class for `config`, wrappers of text models included.

    Raises ValueError where transformers has none: remote code is not run.
    """
    import transformers

    name = (config.architectures or ["?"])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"transformers {transformers.__version__} has no architecture {name}")
    return found
