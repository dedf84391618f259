"""The token embedding of a model, read from its checkpoint without loading the model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

NAMES = ("embed_tokens.weight", "shared.weight", "wte.weight", "embed_in.weight")
"""Names of input embeddings in checkpoints, the most common first."""


def read_embedding(directory: Path) -> Tensor:
    """Read the input embedding, [vocabulary, hidden]. Raises ValueError where there is none."""
    file_of_key = _files(directory)
    for name in NAMES:
        keys = [key for key in file_of_key if key.endswith(name)]
        if keys:
            key = min(keys, key=len)
            with _opened(directory / file_of_key[key]) as file:
                embedding: Tensor = file.get_tensor(key)
            return embedding
    raise ValueError(f"{directory} has no token embedding ({', '.join(NAMES)})")


def _files(directory: Path) -> dict[str, str]:
    """Tensor -> the file that holds it."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            return dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is damaged ({error!r})") from error
    with _opened(directory / "model.safetensors") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: name a model directory")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
